"""``tinymim finetune``: train a classifier of your photos on a distilled student, or on any encoder we can read."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb

NEXT = [
    "tinymim eval {student} --data {val}",
    "{segment}",
    "tinymim-export --onnx classifier.onnx --checkpoint {student} --part classifier",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "finetune")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, print the scores."""
    from tinymim.engine import finetune

    return run_verb(args, "finetune", finetune, NEXT)
