"""``tinymim distill``: a small student from a masked-image-modelling teacher (TinyMIM)."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb

DEFAULT = "tinymim_tiny_from_mae_base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, DEFAULT, "distill")
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar="TEACHER",
        help="timm/NAME, e.g. timm/vit_large_patch16_224.mae, or a checkpoint file; "
        "several (NAME=WEIGHT) teach at once",
    )
    parser.add_argument(
        "--teacher-weights",
        nargs="+",
        metavar="FILE",
        help="weights for a timm teacher, instead of downloading; for several one each",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="WORD",
        help="what is compared, WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]: qk+vv (default), "
        "output, attn_pre, attn_post, ffn_pre, qkv, class_token",
    )
    parser.add_argument(
        "--chain",
        metavar="TEACHER:STUDENT:STUDENT",
        help="e.g. mae_large:base:small:tiny; each student is the next teacher",
    )
    parser.add_argument("--teacher-heads", type=int, help="heads a block of a teacher file that does not say")


def run(args: argparse.Namespace) -> int:
    """Distil, once or in a chain."""
    from tinymim.engine import distill, load_recipe

    given = (args.cfg_options or {}).get("chain") or (args.recipe and load_recipe(args.recipe).get("chain"))
    if args.chain or given:
        return _run_chain(args)
    return run_verb(args, distill, NEXT)


NEXT = [
    "tinymim segment upernet_tinymim_t_light --data-root FOLDER --student {student} --work-dir runs/seg",
    "tinymim finetune --student {student} --data TRAIN --val-data VAL",
    "tinymim-export --onnx backbone.onnx --checkpoint {student} --part backbone",
]


def _run_chain(args: argparse.Namespace) -> int:
    """Every hop, then one report for the chain."""
    from tinymim.engine import distill_chain
    from tinymim.errors import ConfigError

    for name in ("teacher", "student", "init_from"):
        if getattr(args, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with a chain",
                "the chain names the first teacher and every student",
                "write it into --chain TEACHER:STUDENT:STUDENT, or leave --chain out",
            )
    if args.recipe == DEFAULT:
        args.recipe = "tinymim_chain"
    return run_verb(args, distill_chain, NEXT)
