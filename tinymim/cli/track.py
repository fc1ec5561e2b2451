"""``tinymim track``: train a tracker on a student, score one with ``--test``, follow a target in a video with one.

``tinymim track --data SEQUENCES`` trains; ``tinymim track --test FILE --data SEQUENCES`` scores; ``tinymim track FILE
VIDEO --box X Y W H`` follows; ``tinymim track --generate FOLDER`` draws sequences with known truth. FILE is a
``tracker.pth`` or an .onnx made of one; an .onnx needs numpy, Pillow and onnxruntime only.
"""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim.cli import spelled
from tinymim.cli._cfg_options import add_cfg_options
from tinymim.cli._run import show_recipe
from tinymim.engine.settings import TrackSettings, add_options
from tinymim.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

    from tinymim.track.following import Network

OPTIONS = {  # what each way to call the verb takes
    "training": {f.name for f in fields(TrackSettings)} | {"recipe", "print_config"},
    "--test": {"data", "baseline", "json"},
    "following": {"box", "pictures", "out", "overwrite"},
    "--generate": {"sequences", "frames", "size", "seed", "overwrite"},
}

EACH_FRAME = "note:    the template goes through the network with every frame, and its time is in the speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="tracker.pth or tracker.onnx, to test or to follow with"
    )
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="folder of frames, or a video file (needs PyAV)")
    parser.add_argument("--test", action="store_true", help="score FILE on the sequences of --data")
    group = parser.add_argument_group("to train; --data, --out and --overwrite serve the others, too")
    about = "a name (tinymim list recipes) or a .py file of the same keys"
    group.add_argument("--recipe", default=TrackSettings.default_recipe, help=about)
    add_options(group, TrackSettings)
    group.add_argument("--steps", dest="max_steps", type=int, default=argparse.SUPPRESS, help="same as --max-steps")
    group.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    add_cfg_options(group, "any recipe key; +KEY=VALUE adds one that is not known")
    group = parser.add_argument_group("with --test")
    group.add_argument("--baseline", action="store_true", help="also score a template matcher and a box that stays")
    group.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    group = parser.add_argument_group("to follow")
    words = ("X", "Y", "W", "H")
    group.add_argument("--box", nargs=4, type=float, metavar=words, help="the target in the first frame, pixels")
    group.add_argument("--pictures", action="store_true", help="also write every frame with its box")
    group = parser.add_argument_group("with --generate")
    group.add_argument("--generate", metavar="FOLDER", help="draw sequences with known truth")
    group.add_argument("--sequences", type=int, metavar="N", help="default 24")
    group.add_argument("--frames", type=int, metavar="N", help="of each; default 60")
    group.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="pixels; default 240 320")


def run(args: argparse.Namespace) -> int:
    """Find out which of the four is asked for, refuse what belongs to another, do it."""
    if args.generate:
        _check(args, "--generate", files=0)
        return generate(args)
    if args.test:
        _check(args, "--test", files=1)
        return test(args)
    if args.file is not None or args.video is not None:
        _check(args, "following", files=2)
        return use(args)
    _check(args, "training", files=0)
    return train(args)


def _check(args: argparse.Namespace, way: str, *, files: int) -> None:
    """Refuse options of another way to call the verb, and missing words.

    Raises:
        ConfigError: see above.
    """
    mine = OPTIONS[way]
    usual = {"recipe": TrackSettings.default_recipe}
    for other, names in OPTIONS.items():
        for name in sorted(names - mine):
            if getattr(args, name, None) not in (None, False, usual.get(name)):
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} and {way}", f"{option} is for {other}", f"leave {option} out")
    given = [word for word in (args.file, args.video) if word is not None]
    if len(given) > files:
        raise ConfigError(f"{given[files]!r} and {way}", "no such word belongs here", f"leave {given[files]} out")
    if len(given) < files:
        fix = {
            "--test": "tinymim track --test tracker.pth --data SEQUENCES",
            "following": "tinymim track tracker.pth VIDEO --box X Y W H; to train, tinymim track --data SEQUENCES",
        }[way]
        raise ConfigError(f"{way} needs {'FILE' if not given else 'a VIDEO, too'}", "it was not given", fix)
    if "data" in mine and args.data is None and not args.print_config:
        raise ConfigError("no sequences", "--data is missing", "add --data FOLDER (LaSOT's layout, or NAME/img)")


def generate(args: argparse.Namespace) -> int:
    """Draw sequences."""
    from tinymim.track.generate import generate_sequences

    given = {name: getattr(args, name) for name in ("sequences", "frames", "seed")}
    given["size"] = None if args.size is None else tuple(args.size)
    root = generate_sequences(
        args.generate, overwrite=args.overwrite, **{name: value for name, value in given.items() if value is not None}
    )
    print(f"next:    tinymim track --data {shlex.quote(str(root))} --student STUDENT")
    return 0


def train(args: argparse.Namespace) -> int:
    """Train, and print what to type next."""
    values = {each.name: getattr(args, each.name) for each in fields(TrackSettings)}
    if args.print_config:
        return show_recipe(args.recipe, TrackSettings(**values).overrides(), "track")
    from tinymim.compat import is_first_process
    from tinymim.track.job import train_tracker

    result = train_tracker(args.recipe, **values)
    if not args.dry_run and is_first_process():
        from tinymim_export.report.page import run_report

        data = shlex.quote(str(args.val_data or args.data))
        file, onnx = (shlex.quote(str(path)) for path in (result.tracker, result.out / "tracker.onnx"))
        print(f"tracker: {result.tracker}\nreport:  {run_report(result.out)}")
        print(f"next:    tinymim track --test {file} --data {data} --baseline")
        print(f"next:    tinymim-export --onnx {onnx} --checkpoint {file}")
    return 0


def open_network(file: str | Path) -> "Network":
    """The network of a ``tracker.pth``, or of an .onnx made of one.

    Raises:
        TinyMIMError: no such file, damaged, or no tracker.
    """
    if Path(file).suffix == ".onnx":
        from tinymim_export.runtime.tracker import OnnxNetwork

        network = OnnxNetwork(file)
        if not network.verified:
            print(f"note: {network.name} is not verified, or was changed since: tinymim-export --verify-only checks it")
        return network
    from tinymim.track.stored import TorchNetwork

    return TorchNetwork(file)


def test(args: argparse.Namespace) -> int:
    """Score a tracker, and with ``--baseline`` what it must beat."""
    from tinymim.files import write_json
    from tinymim.track.evaluate import evaluate_tracker
    from tinymim.track.following import FirstBox, Follower, OneStream, TemplateMatcher
    from tinymim.track.sequences import read_sequences

    followers: list[Follower] = [OneStream(open_network(args.file))]
    followers += [TemplateMatcher(), FirstBox()] if args.baseline else []
    sequences = read_sequences(args.data)
    scores = [evaluate_tracker(follower, sequences) for follower in followers]
    for each in scores:
        each.print()
    print(EACH_FRAME)
    if args.json:
        value = scores[0].to_dict()
        write_json(args.json, value | ({"baselines": [s.to_dict() for s in scores[1:]]} if args.baseline else {}))
    first, box = sequences[0].frames[0].parent, " ".join(f"{v:g}" for v in sequences[0].truth[0])
    words = f"{shlex.quote(args.file)} {shlex.quote(str(first))} --box {box} --pictures"
    print(f"next:    tinymim track {words} --out {Path(args.file).suffix.removeprefix('.')}_track")
    return 0


def use(args: argparse.Namespace) -> int:
    """Follow a target, write its boxes."""
    from tinymim.track.following import OneStream, follow

    if args.box is None:
        raise ConfigError("no target", "--box is missing", "add --box X Y W H, pixels of the first frame")
    out = Path(args.out or f"{Path(args.video).resolve().stem}_track")
    total, frames = open_frames(Path(args.video))
    follower = OneStream(open_network(args.file))
    more: dict[str, Any] = dict(pictures=args.pictures, overwrite=args.overwrite)
    result = follow(follower, frames, args.box, out, source=str(args.video), total=total, **more)
    result.print()
    print(EACH_FRAME)
    if not args.pictures:
        words = shlex.join([args.file, args.video, "--box", *(f"{v:g}" for v in args.box)])
        print(f"next:    tinymim track {words} --pictures --overwrite{spelled(args, 'out')}")
    return 0


def open_frames(video: Path) -> tuple[int, "Iterator[Image.Image]"]:
    """Number of frames, and the frames, of a folder of photos or a video file; both are checked whole first.

    Raises:
        DataError: there is no such video, it holds no frames, ends early, or its frames have different sizes.
        ConfigError: PyAV is missing.
    """
    from PIL import Image

    from tinymim.data.pixels import open_photo
    from tinymim.track.sequences import frames_size, list_frames

    if video.is_dir():
        inner = video / "img" if (video / "img").is_dir() else video
        paths = list_frames(inner, option="VIDEO")
        frames_size(paths, inner)
        return len(paths), (open_photo(path) for path in paths)
    if not video.is_file():
        raise DataError(f"no video at {video}", "it does not exist", "give a folder of frames, or a video file")
    from tinymim_export.runtime.pictures import Video

    count = Video(video).count_frames()
    return count, (Image.fromarray(frame) for frame in Video(video))
