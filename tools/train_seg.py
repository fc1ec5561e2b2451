#!/usr/bin/env python
"""Train UperNet on a student backbone. On n GPUs: torchrun --nproc_per_node=N tools/train_seg.py CONFIG ..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from tinymim.cli import run_command
from tinymim.compat import is_first_process


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that train_seg and test_seg share."""
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
        help="found by itself under torchrun; taken for compatibility with MMSegmentation",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="any config key, e.g. train_cfg.max_iters=2000 train_dataloader.batch_size=4",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool; their names are the keywords of tinymim.seg.train_segmentor."""
    parser.add_argument("config", help="file, or a name in mmseg_configs such as upernet_tinymim_b")
    parser.add_argument("--work-dir", metavar="FOLDER", help="run folder; default runs/<config>")
    parser.add_argument(
        "--student",
        metavar="FILE",
        help="weights of the backbone: student.pth or any file "
        "tinymim.load_weights reads; without it training starts from scratch",
    )
    parser.add_argument("--resume", action="store_true", help="go on exactly where the run in --work-dir stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --work-dir")
    parser.add_argument("--dry-run", action="store_true", help="one step on random pixels: memory and time, no files")
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16, on GPUs without it float16")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, print the scores and what to type next."""
    from tinymim.seg import estimate_segmentor, train_segmentor
    from tinymim_export.report.page import run_report

    values = {key: value for key, value in vars(args).items() if key not in ("launcher", "dry_run")}
    if args.dry_run:
        unused = ("student", "work_dir", "resume", "overwrite", "amp")
        print(estimate_segmentor(**{key: value for key, value in values.items() if key not in unused}))
        return 0
    values["work_dir"] = args.work_dir or Path("runs") / Path(args.config).name.removesuffix(".py")
    result = train_segmentor(**values)
    if is_first_process():
        result.print()
        data = f" --data-root {args.data_root}" if args.data_root else ""
        print(f"segmentor: {result.segmentor}\nreport:  {run_report(result.work_dir)}")
        print(f"next:    python tools/test_seg.py {args.config} {result.segmentor}{data} --tta")
        print(f"next:    tinymim-export --onnx {result.work_dir / 'segmentor.onnx'} --checkpoint {result.segmentor}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("train_seg.py", __doc__ or "", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
