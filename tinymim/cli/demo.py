"""``tinymim demo``: from nothing to a deployed, measured segmentor in minutes, and a page that shows it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb; their names are the keywords of :func:`tinymim.demo.run.demo`."""
    parser.add_argument("--data", metavar="FOLDER", help="labelled photos in ADE20K layout; default: drawn scenes")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="folder for all files")
    parser.add_argument("--seed", type=int, default=0, help="fixes scenes, initial weights and order")
    parser.add_argument("--minutes", type=float, default=6.0, help="target duration on two cores")
    parser.add_argument("--resume", action="store_true", help="continue where the demo in --out stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace the demo in --out")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print what to type next."""
    from tinymim.demo.report import next_commands
    from tinymim.demo.run import demo

    result = demo(**vars(args))
    for what, command in next_commands(Path(result.out), args.data):
        print(f"next: {command}   # {what.lower()}")
    return 0
