#!/usr/bin/env python
"""Download ADE20K (SceneParse150, 0.9 GB), verify its checksum, unpack it and check the layout."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tinymim.cli import run_command
from tinymim.data.ade20k_release import NAME, SHA1, URL, check, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool."""
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help=f"folder for {NAME}")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check this folder")
    parser.add_argument("--keep-zip", action="store_true", help="keep the archive")
    parser.add_argument("--url", default=URL, help=argparse.SUPPRESS)
    parser.add_argument("--sha1", default=SHA1, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Download what is missing, check, print what to type next."""
    folder = args.check or prepare(args.out, url=args.url, sha1=args.sha1, keep_zip=args.keep_zip)
    print(f"ok: {check(folder)}")
    print(
        f"next:    tinymim segment upernet_tinymim_b --data-root {shlex.quote(str(folder))} "
        "--student student.pth --work-dir runs/ade20k_b"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("prepare_ade20k.py", __doc__ or "", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
