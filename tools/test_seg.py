#!/usr/bin/env python
"""``tinymim segment --test`` under its former name. On n GPUs: torchrun --nproc_per_node=N tools/test_seg.py ..."""

import argparse
import sys
from collections.abc import Sequence

from tinymim.cli import run_command, segment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool."""
    segment.add_config_arguments(parser)
    segment.add_testing_options(parser)
    segment.add_data_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("test_seg.py", __doc__ or "", add_arguments, segment.test, argv)


if __name__ == "__main__":
    sys.exit(main())
