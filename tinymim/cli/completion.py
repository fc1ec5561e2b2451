"""``tinymim completion``: a script that completes commands and options in a shell."""

import argparse
import importlib

SHELLS = ("bash", "zsh", "tcsh")
PATHS = ("FILE", "FOLDER", "PHOTO", "RUN", "STORE", "LAYOUT", "CHECKPOINT", "TEACHER", "CONFIG", "SHARDS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    print(shtab.complete(whole_parser(shtab.FILE), args.shell))
    return 0


def whole_parser(file: object) -> argparse.ArgumentParser:
    """All commands in one parser.

    Args:
        file: How an option that takes a path is completed.
    """
    from tinymim.cli import VERBS

    parser = argparse.ArgumentParser(prog="tinymim")
    commands = parser.add_subparsers()
    for verb, text in VERBS.items():
        own = commands.add_parser(verb, help=text)
        importlib.import_module(f"tinymim.cli.{verb}").add_arguments(own)
        for action in own._actions:
            words = action.metavar if isinstance(action.metavar, str) else ""
            if words.startswith(PATHS):
                action.complete = file  # type: ignore[attr-defined]
    return parser
