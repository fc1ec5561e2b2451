"""``tinymim segment``: train a segmentor (UperNet and others) on a student backbone; with ``--test``, score one.

On n GPUs: ``torchrun --nproc_per_node=N -m tinymim segment CONFIG ...``.
"""

import argparse
import contextlib
import shlex
from pathlib import Path

from tinymim.cli import spelled
from tinymim.cli._cfg_options import add_cfg_options
from tinymim.compat import is_first_process
from tinymim.engine.settings import LOG_HELP
from tinymim.errors import ConfigError
from tinymim.files import config_file
from tinymim.hub import is_hub

LENGTH = ("epochs", "max_steps", "batch_size", "lr", "img_size")  # which a dry run shares
RUN = ("student", "balance", "patience", "log", "resume", "overwrite", "amp", "strategy")
TEACHING = ("teacher_segmentor", "pseudo")
TRAINING = ("work_dir", "dry_run", *LENGTH, *RUN, *TEACHING)
TESTING = ("checkpoint", "tta", "json", "markdown")
DATA = ("data_root", "ignore_label", "reduce_zero_label", "device", "cfg_options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_config_arguments(parser)
    parser.add_argument("--test", action="store_true", help="score CHECKPOINT on the validation photos")
    add_training_options(parser.add_argument_group("to train"))
    add_testing_options(parser.add_argument_group("with --test"))
    add_data_options(parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``CONFIG [CHECKPOINT]``, which :func:`test` reads."""
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="file, or a name in mmseg_configs such as upernet_tinymim_b; not needed to test a segmentor.pth",
    )
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="to test: segmentor.pth or checkpoints/iter_N.pth"
    )


def add_training_options(parser: argparse._ActionsContainer) -> None:
    """Options of training; their names are the keywords of :func:`tinymim.seg.train_segmentor`."""
    parser.add_argument("--work-dir", metavar="FOLDER", help="run folder; default runs/<config>")
    parser.add_argument(
        "--student",
        metavar="FILE",
        help="weights of the backbone: student.pth or any file that "
        "tinymim.load_weights reads; without it training starts from scratch",
    )
    parser.add_argument(
        "--teacher-segmentor",
        metavar="FILE",
        help="segmentor.pth that teaches its logits beside the labels; losses: --cfg-options teacher.kl=1 (per pixel) "
        "teacher.channel=0 (per class) teacher.temperature=1 teacher.channel_temperature=4",
    )
    parser.add_argument(
        "--pseudo",
        metavar="LAYOUT[=WEIGHT]",
        help="also train on photos that tinymim label has labelled; one of them is drawn WEIGHT times as often as a "
        "labelled one (default 1)",
    )
    parser.add_argument("--epochs", type=float, help="passes over the training photos; default the config's steps")
    parser.add_argument("--max-steps", type=int, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch-size", type=int, help="global batch, split over processes; default the config's")
    parser.add_argument("--lr", type=float, help="peak learning rate; default the config's")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the training crops, or height and width; the sizes that photos are resized to follow",
    )
    parser.add_argument(
        "--balance", choices=("weights", "ohem"), help="let rare classes count more (weights), or only hard pixels"
    )
    parser.add_argument(
        "--patience", type=int, metavar="N", help="stop after N validations in a row without a better mIoU"
    )
    parser.add_argument(
        "--log",
        nargs="+",
        metavar="NAME",
        help=LOG_HELP,
    )
    parser.add_argument("--resume", action="store_true", help="continue exactly where the run in --work-dir stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --work-dir")
    parser.add_argument("--dry-run", action="store_true", help="one step on random pixels: memory and time, no files")
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16; float16 on GPUs without it")
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp"), help="of several processes: ddp, or fsdp to shard weights and moments"
    )


def add_testing_options(parser: argparse._ActionsContainer) -> None:
    """Options of testing."""
    parser.add_argument("--tta", action="store_true", help="average over sizes and mirror images")
    parser.add_argument("--json", metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write a table of the scores")


def add_data_options(parser: argparse._ActionsContainer) -> None:
    """Options that training and testing share."""
    parser.add_argument("--data-root", metavar="FOLDER", help="labelled folder in ADE20K layout; default the config's")
    parser.add_argument(
        "--ignore-label",
        type=int,
        nargs="+",
        metavar="ID",
        help="ids to ignore besides 255, for folders without dataset.json",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="id 0 means no class, for folders without dataset.json",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        help="detected under torchrun; accepted for compatibility with MMSegmentation",
    )
    add_cfg_options(
        parser,
        "any config key, e.g. train_cfg.max_iters=2000 train_dataloader.batch_size=4; +KEY=VALUE adds one not known",
    )


def run(args: argparse.Namespace) -> int:
    """Train, or test."""
    for name in TRAINING if args.test else TESTING:
        if not getattr(args, name):
            continue
        word = "CHECKPOINT" if name == "checkpoint" else "--" + name.replace("_", "-")
        if args.test:
            raise ConfigError(f"{word} and --test", f"{word} is for training", f"leave out {word} or --test")
        raise ConfigError(f"{word} without --test", f"{word} is for testing", f"add --test, or leave {word} out")
    if not args.test and args.config is None:
        raise ConfigError(
            "no config", "CONFIG says what to train", "name one, e.g. tinymim segment upernet_tinymim_t_light"
        )
    if not args.test and Path(args.config).suffix == ".pth":
        raise ConfigError(f"{args.config} is a checkpoint", "training starts from a config", "add --test to score it")
    return test(args) if args.test else train(args)


def is_config(name: str) -> bool:
    """Whether a word names a config: a .py file, or one of mmseg_configs."""
    with contextlib.suppress(ConfigError):
        return Path(config_file(name)).suffix == ".py"
    return Path(name).suffix == ".py"


def train(args: argparse.Namespace) -> int:
    """Train, print the scores and what to type next."""
    from tinymim.seg import estimate_segmentor, train_segmentor
    from tinymim_export.report.page import run_report

    data = {name: getattr(args, name) for name in DATA}
    if args.dry_run:
        given = {name: getattr(args, name) for name in ("student", *LENGTH, *TEACHING)}
        cost = estimate_segmentor(args.config, **given, **data)
        if is_first_process():
            print(cost)
        return 0
    result = train_segmentor(
        args.config,
        work_dir=args.work_dir or Path("runs") / Path(args.config).name.removesuffix(".py"),
        **{name: getattr(args, name) for name in (*LENGTH, *RUN, *TEACHING)},
        **data,
    )
    if is_first_process():
        result.print()
        file, onnx = (shlex.quote(str(path)) for path in (result.best, result.work_dir / "segmentor.onnx"))
        same = spelled(args, "data_root", "ignore_label", "reduce_zero_label")
        print(f"segmentor: {result.segmentor}\nreport:  {run_report(result.work_dir)}")
        if result.best != result.segmentor:
            print(f"best:    {result.best}, of an earlier validation than the last")
        print(f"next:    tinymim segment --test {file}{same} --tta")
        print(f"next:    tinymim-export --onnx {onnx} --checkpoint {file}")
    return 0


def _beside(checkpoint: str) -> Path:
    """An .onnx file's name for a checkpoint: beside it, or here for one of the hub."""
    if is_hub(checkpoint):
        return Path(checkpoint.partition("@")[0].rpartition("/")[2] + ".onnx")
    return Path(checkpoint).with_suffix(".onnx")


def test(args: argparse.Namespace) -> int:
    """Test, print the scores and what to type next."""
    from tinymim.seg import test_segmentor

    config, checkpoint = (args.config, args.checkpoint) if args.checkpoint else (None, args.config)
    if checkpoint is None or is_config(checkpoint):
        raise ConfigError(
            "no checkpoint",
            f"{'nothing' if checkpoint is None else 'only a config'} was given"
            if config is None
            else f"{checkpoint} is a config, and the checkpoint comes last",
            "end the line with the segmentor.pth of a `tinymim segment` run (it holds its config)",
        )
    if Path(checkpoint).suffix == ".onnx":
        raise ConfigError(
            f"{checkpoint} is an exported file",
            "a checkpoint is a .pth",
            f"tinymim eval {shlex.quote(checkpoint)} --data FOLDER scores the file itself",
        )
    result = test_segmentor(config, checkpoint, tta=args.tta, **{name: getattr(args, name) for name in DATA})
    if is_first_process():
        result.print()
        if args.json:
            result.to_json(args.json)
        if args.markdown:
            result.to_markdown(args.markdown)
        file, onnx = (shlex.quote(str(path)) for path in (checkpoint, _beside(checkpoint)))
        given = f" --config {shlex.quote(config)}" if config else ""
        print(f"next:    tinymim-export --onnx {onnx} --checkpoint {file}{given}")
    return 0
