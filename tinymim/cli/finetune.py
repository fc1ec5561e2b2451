"""``tinymim finetune``: a classifier of your photos from a distilled student (or any encoder this project reads)."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "finetune_tiny", "finetune")
    parser.add_argument("--student", metavar="FILE", help="encoder to start from; without it: random weights")
    parser.add_argument("--num-heads", type=int, help="heads a block; another number than the file's regroups them")
    parser.add_argument("--teacher", help="timm/NAME with a classifier, or a classifier.pth: DeiT's distillation")
    parser.add_argument("--teacher-weights", metavar="FILE", help="weights for a timm teacher, instead of downloading")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, print the scores."""
    from tinymim.engine import finetune

    return run_verb(
        args,
        finetune,
        [
            "tinymim eval {student} --data {val}",
            "tinymim segment upernet_tinymim_t_light --data-root FOLDER --student {student} --work-dir runs/seg",
        ],
    )
