"""``tinymim pretrain``: pre-train a masked autoencoder on your own photos, as a teacher."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "pretrain")


def run(args: argparse.Namespace) -> int:
    """Pre-train."""
    from tinymim.engine import pretrain

    return run_verb(args, "pretrain", pretrain)
