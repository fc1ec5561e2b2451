"""``tinymim bench``: latency, memory and provider of .onnx files; needs no PyTorch."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("files", nargs="+", metavar="FILE.onnx", help="timed in turns, in one process")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu", help="never falls back: an error instead")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: every core of this process")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=None,
                        help="for files with free sizes; default: the size they were exported at")  # fmt: skip
    parser.add_argument("--split", action="store_true", help="time backbone, pyramid, head, up-sampling (needs onnx)")
    parser.add_argument("--runs", type=int, default=None, help="timed runs a file; default: what --seconds allows")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each file, at least 10 runs")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--markdown", default=None, metavar="FILE", help="write the result as Markdown")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    from tinymim_export.latency import bench

    result = bench(
        args.files,
        provider=args.provider,
        threads=args.threads,
        batch=args.batch,
        size=None if args.size is None else (args.size[0], args.size[1]),
        split=args.split,
        runs=args.runs,
        seconds=args.seconds,
    )
    result.print()
    if args.json:
        result.to_json(args.json)
    if args.markdown:
        Path(args.markdown).write_text(result.to_markdown())
    files = " ".join(args.files)
    if not args.split and any(row.part == "segmentor" for row in result.rows):
        print(f"next: tinymim bench {files} --split")
    else:
        print(f"next: tinymim bench {files} --json bench.json --markdown bench.md")
    return 0
