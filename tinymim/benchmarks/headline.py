"""The paper's headline rows: exact command lines, and the cost of each by its dry run; writes docs/headline.md.

Photos are only counted, not opened: a folder of 1,281,167 empty files in 1,000 sub-folders gives the same page.
"""

import argparse
import contextlib
import io
import platform
from collections.abc import Sequence

from tinymim.cli import main as tinymim
from tinymim.cli import run_command
from tinymim.errors import CheckFailed
from tinymim.files import environment, write_text

SIZES = {  # size -> (ImageNet-1k top-1, ADE20K mIoU) of the paper's table 3, recipe of the distillation, segmentation
    "base": (85.0, 52.2, "tinymim_base_from_mae_large", "upernet_tinymim_b"),
    "small": (83.0, 48.4, "tinymim_small_from_tinymim_base", "upernet_tinymim_s"),
    "tiny": (75.8, 44.0, "tinymim_tiny_from_tinymim_small", "upernet_tinymim_t"),
}
LAUNCH = "torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m tinymim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--data", required=True, metavar="FOLDER", help="ImageNet's training photos, by class")
    parser.add_argument("--seg-data", required=True, metavar="FOLDER", help="ADE20K, or a few pairs of it")
    parser.add_argument("--out", default="docs/headline.md", metavar="FILE")


def dry_run(argv: list[str]) -> str:
    """The cost that a command prints with --dry-run.

    Raises:
        CheckFailed: the command failed.
    """
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = tinymim([*argv, "--dry-run"])
    if code:
        raise CheckFailed(f"{' '.join(argv)} ended with {code}", "its error is printed above", "correct that first")
    return "\n".join(line for line in output.getvalue().splitlines() if line.strip())


def run(args: argparse.Namespace) -> int:
    """Dry-run every step, write the page."""
    from tinymim.engine import load_recipe

    env = environment()
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("tinymim", "torch", "timm"))
    lines = [
        "# The headline rows of TinyMIM",
        "",
        "The numbers are the paper's (table 3: 300 epochs per hop, direct transfer to ADE20K); they were not run here.",
        "32 GPUs as in the paper, a global batch of 4,096; fewer GPUs take the same steps of as many images.",
        "The fine-tuning recipe of B is published; those of S and T are ours (theirs is in a supplement that is",
        "not public). In the paper's logs ADE20K takes 0.456 s per step and 25.2 GB per GPU for B on 8 V100, 28 hours.",
        "",
        f"Dry runs: {platform.system()}, {env['cpu']}, {env['cores']} cores, busy with other work, no GPU; {versions}.",
        "FLOP hold anywhere, hours on a processor for this one only; hours on GPUs are those FLOP over an assumed",
        "share of NVIDIA's peaks. Memory is of float32 activations of the images a",
        "GPU has in the launch lines; half precision and a smaller `micro_batch` take less. A teacher that does not",
        "exist yet is replaced by a model of the next larger size. Segmentation: a step's 16 crops in one process;",
        "each of 8 GPUs has 2.",
    ]
    for size, (top1, miou, recipe, config) in SIZES.items():
        student = f"runs/{recipe}/student.pth"
        distil = ["distill", "--recipe", recipe, "--data", args.data, "--cfg-options", f"micro_batch={4096 // 32}"]
        share = load_recipe(f"finetune_{size}").batch_size // 8
        tune = [
            "finetune",
            "--recipe",
            f"finetune_{size}",
            "--data",
            args.data,
            "--cfg-options",
            f"micro_batch={share}",
        ]
        print(f"{size}: dry runs")
        costs = [
            dry_run(distil),
            dry_run(tune),
            dry_run(["segment", config, "--data-root", args.seg_data]),
        ]
        costs = [cost.replace(args.data, "imagenet/train") for cost in costs]
        lines += [
            "",
            f"## TinyMIM-{size[0].upper()}: {top1} top-1, {miou} mIoU in the paper",
            "",
            "```bash",
            f"{LAUNCH} distill --recipe {recipe} --data imagenet/train",
            f"torchrun --nproc_per_node=8 -m tinymim finetune --recipe finetune_{size} --student {student} "
            "--data imagenet/train --val-data imagenet/val",
            f"torchrun --nproc_per_node=8 -m tinymim segment {config} --data-root ADE20K "
            f"--student {student} --work-dir runs/{config} --cfg-options train_dataloader.batch_size=2",
            "```",
            "",
            "`distill --dry-run`:",
            "",
            "```",
            costs[0],
            "```",
            "",
            "`finetune --dry-run`:",
            "",
            "```",
            costs[1],
            "```",
            "",
            "`segment --dry-run`:",
            "",
            "```",
            costs[2],
            "```",
        ]
    lines += [
        "",
        "All three hops in one command: `tinymim distill --recipe tinymim_chain --data imagenet/train`.",
    ]
    write_text(args.out, "\n".join(lines) + "\n")
    print(f"{args.out}\nnext: {LAUNCH} distill --recipe tinymim_base_from_mae_large --data {args.data}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("headline", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
