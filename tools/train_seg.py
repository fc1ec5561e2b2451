#!/usr/bin/env python
"""``tinymim segment`` under its former name. On n GPUs: torchrun --nproc_per_node=N tools/train_seg.py CONFIG ..."""

import argparse
import sys
from collections.abc import Sequence

from tinymim.cli import run_command, segment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool."""
    parser.add_argument("config", help="file, or a name in mmseg_configs such as upernet_tinymim_b")
    segment.add_training_options(parser)
    segment.add_data_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("train_seg.py", __doc__ or "", add_arguments, segment.train, argv)


if __name__ == "__main__":
    sys.exit(main())
