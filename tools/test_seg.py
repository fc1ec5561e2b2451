#!/usr/bin/env python
"""Score a segmentor on validation photos. On n GPUs: torchrun --nproc_per_node=N tools/test_seg.py ..."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from train_seg import add_data_arguments

from tinymim.cli import run_command
from tinymim.compat import is_first_process
from tinymim.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool; their names are the keywords of tinymim.seg.test_segmentor."""
    parser.add_argument("config", help="file or name in mmseg_configs; may be left out for a segmentor.pth")
    parser.add_argument("checkpoint", nargs="?", help="segmentor.pth or checkpoints/iter_N.pth")
    parser.add_argument("--tta", action="store_true", help="average over sizes and mirror images")
    parser.add_argument("--json", metavar="FILE", help="write the scores there")
    parser.add_argument("--markdown", metavar="FILE", help="write a table there")
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Test, print the scores and what to type next."""
    from tinymim.seg import test_segmentor

    config, checkpoint = (args.config, args.checkpoint) if args.checkpoint else (None, args.config)
    if str(checkpoint).endswith(".py"):
        raise ConfigError(
            "no checkpoint", "only a config was given", "add the segmentor.pth of a tools/train_seg.py run"
        )
    skip = ("config", "checkpoint", "launcher", "json", "markdown")
    result = test_segmentor(config, checkpoint, **{k: v for k, v in vars(args).items() if k not in skip})
    if is_first_process():
        result.print()
        if args.json:
            result.to_json(args.json)
        if args.markdown:
            result.to_markdown(args.markdown)
        out = Path(checkpoint).with_suffix(".onnx")
        told = f" --config {config}" if config else ""
        print(f"next:    tinymim-export --onnx {out} --checkpoint {checkpoint}{told}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("test_seg.py", __doc__ or "", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
