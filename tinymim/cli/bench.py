"""``tinymim bench``: latency, memory and provider of .onnx files; needs no PyTorch."""

import argparse
import shlex
from typing import Any

from tinymim.cli import spelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    from tinymim_export.runtime.engines import RUNTIMES, compute_types, provider_names

    parser.add_argument("files", nargs="*", metavar="FILE.onnx", help="timed in turn, in one process")
    parser.add_argument(
        "--runtime",
        action="append",
        choices=list(RUNTIMES),
        default=None,
        help="default onnxruntime; give it twice to time every file on both",
    )
    parser.add_argument(
        "--provider",
        choices=provider_names(),
        default="cpu",
        help="ONNX Runtime's provider; one that is not available is an error, never replaced",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=compute_types(),
        default=None,
        help="compute type of OpenVINO (not the precision of the file); default f32; give it twice for both",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: every core of this process")
    parser.add_argument("--batch", type=int, default=1, help="images per run")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        default=None,
        help="for files with free sizes; default: the size they were exported at",
    )
    parser.add_argument("--split", action="store_true", help="time backbone, pyramid, head, up-sampling")
    parser.add_argument("--explain", action="store_true", help="time by kind of operator, beside the matrix rate here")
    parser.add_argument("--end-to-end", action="store_true", help="time --photos from JPEG to mask, by step")
    parser.add_argument("--photos", default=None, metavar="FOLDER", help="photos for --end-to-end")
    parser.add_argument("--resize-to-file", action="store_true", help="with --end-to-end: stretch them to the file")
    parser.add_argument("--runs", type=int, default=None, help="timed runs per file; default: what --seconds allows")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each file, at least 10 runs")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("BEFORE.json", "AFTER.json"),
        default=None,
        help="measure nothing: compare two stored results from the same machine",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--markdown", default=None, metavar="FILE", help="write the result as Markdown")


def run(args: argparse.Namespace) -> int:
    """Measure or compare, print, write."""
    if args.compare is not None:
        return _compare(args)
    if args.end_to_end or args.photos or args.resize_to_file:
        return _end_to_end(args)
    if args.explain:
        return _explain(args)
    from tinymim_export.bench.latency import bench

    result = bench(
        args.files,
        batch=args.batch,
        size=None if args.size is None else (args.size[0], args.size[1]),
        split=args.split,
        **_engine_and_time(args),
    )
    _show(args, result)
    files = shlex.join(args.files) + spelled(args, "runtime", "provider", "precision", "threads", "size")
    whole = not args.split and all(file.endswith(".onnx") for file in args.files)  # others cannot be cut into parts
    if whole and any(row.part == "segmentor" for row in result.rows):
        print(f"next: tinymim bench {files} --split")
    elif args.json:
        before = shlex.quote(args.json)
        print(f"next: tinymim bench {files} --json after.json; tinymim bench --compare {before} after.json")
    else:
        print(f"next: tinymim bench {files} --json bench.json --markdown bench.md")
    return 0


def _engine_and_time(args: argparse.Namespace) -> dict[str, Any]:
    """What every measurement takes: the runtime and its settings, how often and how long."""
    return dict(
        runtime=args.runtime or "onnxruntime",
        compute_type=args.precision,
        provider=args.provider,
        threads=args.threads,
        runs=args.runs,
        seconds=args.seconds,
    )


def _explain(args: argparse.Namespace) -> int:
    from tinymim.errors import ConfigError
    from tinymim_export.bench.operators import explain

    others = [f"--{name}" for name in ("split", "size") if getattr(args, name)] + ["--batch"] * (args.batch != 1)
    if others:
        raise ConfigError(f"--explain takes no {others[0]}", "files run once, as exported", "leave it out")
    _show(args, explain(args.files, **_engine_and_time(args)))
    print(f"next: tinymim bench {shlex.join(args.files)} --split")
    return 0


def _end_to_end(args: argparse.Namespace) -> int:
    from tinymim.errors import ConfigError
    from tinymim_export.bench.end_to_end import end_to_end

    if not args.end_to_end or not args.photos:
        raise ConfigError(
            "--end-to-end and --photos FOLDER belong together",
            "photos are read and segmented as tinymim predict does",
            "e.g. tinymim bench FILE.onnx --end-to-end --photos FOLDER",
        )
    others = [f"--{name}" for name in ("split", "explain", "size") if getattr(args, name)] + ["--batch"] * (
        args.batch != 1
    )
    if others:
        raise ConfigError(
            f"--end-to-end takes no {others[0]}", "photos run one by one, by the file's contract", "leave it out"
        )
    result = end_to_end(
        args.files,
        args.photos,
        resize_to_file=args.resize_to_file,
        **_engine_and_time(args),
    )
    _show(args, result)
    print(f"next: tinymim bench {shlex.join(args.files)} --split")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from tinymim.errors import ConfigError
    from tinymim_export.bench.compare import compare_benches

    others = [
        *args.files,
        *(f"--{name}" for name in ("split", "explain", "runtime", "precision", "runs", "size") if getattr(args, name)),
    ]
    if others:
        raise ConfigError(
            "--compare measures nothing",
            f"{others[0]} was also given, which only measuring uses",
            f"leave {others[0]} out",
        )
    result = compare_benches(*args.compare)
    _show(args, result)
    print("next: tinymim bench A.onnx B.onnx  (both in one session, which resolves smaller differences)")
    return 0


def _show(args: argparse.Namespace, result: object) -> None:
    """Print and write a result."""
    from tinymim.files import write_text

    result.print()  # type: ignore[attr-defined]
    if args.json:
        result.to_json(args.json)  # type: ignore[attr-defined]
    if args.markdown:
        write_text(args.markdown, result.to_markdown())  # type: ignore[attr-defined]
