"""``tinymim predict``: masks of photos, folders and videos from a segmentor .onnx file; needs no PyTorch."""

import argparse
import shlex
from pathlib import Path

from tinymim.cli import spelled
from tinymim.cli.eval import ENGINE, add_engine_arguments, engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("file", metavar="FILE.onnx", help="a segmentor")
    parser.add_argument(
        "source",
        metavar="PHOTO|FOLDER|VIDEO|CAMERA|URL",
        help="what to segment; a camera is a number (0), a stream an rtsp://, http://, udp://... address",
    )
    parser.add_argument(
        "--out",
        metavar="FILE|FOLDER",
        help="mask.png of a photo; a folder of masks; overlay.mp4 of a video, camera or stream; not needed with --show",
    )
    parser.add_argument("--fps", action="store_true", help="draw frames per second into the overlays of a video, too")
    parser.add_argument("--show", action="store_true", help="show a video, camera or stream in a window")
    parser.add_argument("--seconds", type=float, metavar="S", help="end a camera or a stream; default: Ctrl-C does")
    parser.add_argument("--overlay", action="store_true", help="also write photos with their classes laid over them")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of colour in overlays")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--classes", metavar="FILE", help="class names for files without any: dataset.json, or one name per line"
    )
    add_engine_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write sizes, milliseconds and shares of the classes as JSON")


def run(args: argparse.Namespace) -> int:
    """Segment, print, write; return 1 if a photo could not be read."""
    from tinymim.folders import remove_dead_parts
    from tinymim_export.runtime.predict import predict

    if args.out is not None:
        out = Path(args.out)
        remove_dead_parts(out if out.is_dir() else out.parent)
    result = predict(
        args.file,
        args.source,
        args.out,
        overlay=args.overlay,
        alpha=args.alpha,
        overwrite=args.overwrite,
        rate=args.fps,
        show=args.show,
        seconds=args.seconds,
        classes=None if args.classes is None else read_names(args.classes),
        **engine_options(args),
    )
    result.print()
    if args.json:
        result.to_json(args.json)
    if args.overlay or args.out is None:
        how = spelled(args, "runtime", "provider", "precision", "threads")
        print(f"next: tinymim bench {shlex.quote(args.file)}{how}")
    else:
        again = shlex.join([args.file, args.source, "--out", args.out]) + spelled(args, "seconds", "classes", *ENGINE)
        print(f"next: tinymim predict {again} --overlay --overwrite")
    return 1 if result.skipped else 0


def read_names(path: str) -> list[str]:
    """Class names of a ``dataset.json``, or of a text file with one name per line.

    Raises:
        DataError: the file is neither.
    """
    from tinymim.errors import DataError
    from tinymim.records import Names
    from tinymim.schema import read_json

    try:
        names = (
            read_json(path, Names)["classes"]
            if path.endswith(".json")
            else Path(path).read_text("utf-8-sig").split("\n")
        )
        return [name.strip() for name in names if name.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read class names from {path}",
            str(error),
            'write one name per line, or {"classes": ["road", "car"]}',
        ) from error
