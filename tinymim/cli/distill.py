"""``tinymim distill``: a small student from a masked-image-modelling teacher (TinyMIM)."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "tinymim_tiny_from_mae_base", "tinymim")
    parser.add_argument("--teacher", nargs="+", metavar="TEACHER",
                        help="timm/NAME, e.g. timm/vit_large_patch16_224.mae, or a checkpoint file; "
                             "several (NAME=WEIGHT) teach at once")  # fmt: skip
    parser.add_argument("--teacher-weights", nargs="+", metavar="FILE",
                        help="weights for a timm teacher, instead of downloading; for several one each")  # fmt: skip
    parser.add_argument("--targets", nargs="+", metavar="WORD",
                        help="what is compared, WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]: qk+vv (default), "
                             "output, attn_pre, attn_post, ffn_pre, qkv, class_token")  # fmt: skip
    parser.add_argument("--teacher-heads", type=int, help="heads a block of a teacher file that does not say")


def run(args: argparse.Namespace) -> int:
    """Distil."""
    from tinymim.engine import distill

    return run_verb(args, distill, [
        "python tools/train_seg.py mmseg_configs/upernet_tinymim_t_light.py --data-root FOLDER --student {student} "
        "--work-dir runs/seg",
        "tinymim-export --onnx backbone.onnx --checkpoint {student} --part backbone",
    ])  # fmt: skip
