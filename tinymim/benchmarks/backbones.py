"""Latency of bare backbones by name, exported and timed in turns: the rows of docs/backbones_*.md.

Weights are random: neither time nor size depends on them. Each name has the image side of its own (``_384`` and
``_512`` in TinyViT's). With ``--data`` there is an INT8 row, too, whose ranges are measured on these photos.
"""

import argparse
import shlex
from pathlib import Path

from tinymim.cli import run_command
from tinymim.errors import TinyMIMError
from tinymim.files import write_text

NAMES = (
    "tinymim_vit_tiny",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "tiny_vit_21m_224",
    "tiny_vit_21m_384",
    "tiny_vit_21m_512",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("names", nargs="*", default=[*NAMES], metavar="NAME", help=f"default {', '.join(NAMES)}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="photos: adds INT8")
    parser.add_argument("--out", type=Path, default=Path("runs/backbones"), help="exported files; those there are kept")
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime", "openvino"], help="every file runs on each")
    parser.add_argument("--threads", type=int, help="default every core of this process")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row")
    parser.add_argument("--json", type=Path, help="write the measurements")
    parser.add_argument("--markdown", type=Path, help="write the table")


def files(name: str, args: argparse.Namespace) -> list[Path]:
    """The exported files of a backbone; one that cannot be made in INT8 is said and left out."""
    import torch

    from tinymim import create_model
    from tinymim.models import save_student
    from tinymim_export import export
    from tinymim_export.precision.quantize import quantize

    fp32, int8 = (args.out / f"{name}{end}.onnx" for end in ("", "-int8"))
    if not fp32.is_file():
        torch.manual_seed(0)
        side = name.rpartition("_")[2]
        size = {"img_size": int(side)} if side.isdecimal() else {}
        student = args.out / f"{name}.pth"
        save_student(create_model(name, **size).eval(), student)
        export(student, fp32, part="backbone")
    if args.data is None:
        return [fp32]
    if not int8.is_file():
        try:
            quantize(fp32, int8, precision="int8", calibration=args.data, count=32)
        except TinyMIMError as error:
            print(f"{name}: no INT8: {error.what}; {error.why}")
            return [fp32]
    return [fp32, int8]


def run(args: argparse.Namespace) -> int:
    """Export what is missing, time everything, write the table."""
    from tinymim_export.bench.latency import bench

    args.out.mkdir(parents=True, exist_ok=True)
    every = [file for name in args.names for file in files(name, args)]
    types = ["f32", "bf16"] if "openvino" in args.runtime else None
    result = bench(every, runtime=args.runtime, compute_type=types, threads=args.threads, seconds=args.seconds)
    result.print()
    if args.json:
        result.to_json(args.json)
    if args.markdown:
        given = " ".join(shlex.quote(name) for name in args.names if args.names != [*NAMES])
        line = f"`python tools/bench_backbones.py{' ' + given if given else ''}`"
        write_text(
            args.markdown, f"# Backbones, measured\n\nWritten by {line}; random weights.\n\n{result.to_markdown()}"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of tools/bench_backbones.py."""
    return run_command("bench_backbones", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
