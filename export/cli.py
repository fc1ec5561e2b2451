"""``tinymim-export``: a checkpoint as a verified .onnx file in any precision, or an FP32 file as another one."""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.cli import run_command, spelled
from tinymim.errors import ConfigError
from tinymim.files import write_text
from tinymim.folders import remove_dead_parts
from tinymim_export.precision.base import PRECISIONS, by_block

HELP = "export a checkpoint to ONNX and verify it against PyTorch; quantise, tune, or make a web page of the file"
ONLY_FROM_CHECKPOINT = ("config", "part", "size", "dynamic", "output", "num_heads", "opset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command; those left at None take the default of the Python function."""
    from tinymim_export.tune.targets import targets

    add = parser.add_argument
    add("--checkpoint", default=None, help="segmentor.pth, student.pth, any ViT checkpoint, or hf-hub:OWNER/NAME")
    add("--from", dest="source", default=None, metavar="FILE.onnx", help="start at this FP32 file, not at --checkpoint")
    add("--onnx", default=None, metavar="FILE", help="file to write")
    add("--config", default=None, help="mmseg_configs/...; segmentor.pth holds its own")
    add(
        "--part",
        choices=["backbone", "classifier", "segmentor"],
        default=None,
        help="default: the segmentor, or of other files the backbone",
    )
    add(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        default=None,
        help="fix height and width in pixels; default: what photos or windows come to by the configuration, "
        "free where whole photos come to different sizes",
    )
    add("--dynamic", action="store_true", help="leave height and width free")
    add("--output", choices=["logits", "mask"], default=None, help="what a segmentor gives; default: logits")
    add(
        "--photos",
        default=None,
        metavar="FOLDER",
        help="real photos to verify on; the first goes through the model's own test",
    )
    add("--num-heads", type=int, default=None, help="heads per block, for files that do not store it")
    add("--opset", type=int, default=None, help="ONNX operator set, 18 to 23; default: 20")
    add("--seed", type=int, default=0, help="of the random verification inputs and the choice of calibration photos")
    add("--json", default=None, metavar="FILE", help="write the result as JSON")
    add("--markdown", default=None, metavar="FILE", help="write the result as Markdown")
    add(
        "--verify-only",
        default=None,
        metavar="FILE",
        help="export nothing: verify this .onnx again, against --checkpoint or (other precisions) --from",
    )
    add = parser.add_argument_group("other formats").add_argument
    add(
        "--format",
        default=None,
        metavar="NAME",
        help="openvino or executorch: write the file in this format, to --out; docs/formats.md",
    )
    add("--out", default=None, metavar="FILE", help="for --format: FILE.xml of OpenVINO, with its FILE.bin; FILE.pte")
    add = parser.add_argument_group("precision and graph").add_argument
    add("--precision", default=None, metavar="NAME", help=f"{', '.join(PRECISIONS)}; default: fp32")
    add(
        "--graph",
        nargs="+",
        default=None,
        metavar="VARIANT",
        help="attention, merged, pixels, early-argmax; --tune tries the first three, or those named here",
    )
    add("--calibration", default=None, metavar="FOLDER", help="photos like those in use, for --precision int8")
    add("--calibration-count", type=int, default=None, metavar="N", help="how many of them; default: 64")
    add("--calibration-method", choices=["percentile", "entropy", "minmax"], default=None, help="default: percentile")
    add("--exclude-blocks", nargs="+", default=None, metavar="BLOCK", help='leave in float, e.g. "block 3" head')
    add("--data", default=None, metavar="FOLDER", help="labelled photos (ADE20K layout) to score mIoU on")
    add("--limit", type=int, default=None, metavar="N", help="score this many photos of --data, evenly spread")
    add("--mode", choices=["whole", "slide"], default=None, help="how --data is scored; default: the file's contract")
    add("--resize-to-file", action="store_true", help="score --data stretched to the fixed size of the file")
    add("--ignore-label", type=int, nargs="+", default=None, metavar="ID", help="ids in --data that count for nothing")
    add("--reduce-zero-label", action=argparse.BooleanOptionalAction, default=None, help="id 0 in --data: no class")
    add(
        "--max-miou-drop",
        type=float,
        default=None,
        metavar="POINTS",
        help="leave the most harmful blocks in float until no more is lost; --tune: its budget, default 0.5",
    )
    add("--sensitivity", action="store_true", help="write no file: quantise block by block and score each on --data")
    add = parser.add_argument_group("verdict").add_argument
    add("--tune", action="store_true", help="try precisions, graph variants and runtimes on --data; keep the winner")
    add("--min-speedup", type=float, default=None, metavar="X", help="a candidate must be X times as fast; default 1.2")
    add("--latency-budget", default=None, metavar="MS", help="and take no longer than this, e.g. 100ms")
    add(
        "--runtimes",
        nargs="+",
        default=None,
        metavar="NAME",
        help=f"{', '.join(targets())}; default: those that are here",
    )
    add("--seconds", type=float, default=None, metavar="S", help="to time each candidate; default: 5")
    add = parser.add_argument_group("web page").add_argument
    add("--web", default=None, metavar="DIR", help="write a page that runs the file in a browser")
    add("--ort-web", default=None, metavar="DIR", help="onnxruntime-web on this disk, in place of npm")


def run(args: argparse.Namespace) -> int:
    """Check that the options belong together, then do the one thing they ask for."""
    _check(args)
    if args.verify_only is not None:
        return _verify(args)
    if args.tune:
        code = _tune(args)
        return _web(args, args.onnx) if args.web is not None else code
    if args.sensitivity:
        return _with_fp32(args, _sensitivity)
    if args.format is not None:
        return _with_fp32(args, _format)
    if args.onnx is None:
        return _web(args, args.source)
    remove_dead_parts(Path(args.onnx).parent)
    code = _with_fp32(args, _reduce) if _reduced(args) else _export(args, args.onnx)
    return _web(args, args.onnx) if args.web is not None and code == 0 else code


def _reduced(args: argparse.Namespace) -> bool:
    """Whether the requested file is not the plain FP32 export."""
    return args.precision not in (None, "fp32") or bool(args.graph) or args.max_miou_drop is not None


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not belong together, before any work."""
    if args.precision is not None and not args.tune and args.precision not in PRECISIONS:
        from tinymim_export.precision.quantize import check_options

        check_options(args.precision, None, "percentile", ())  # bf16 has an explanation of its own
    calibrated = args.precision in PRECISIONS and PRECISIONS[args.precision].needs_calibration
    wrong: list[tuple[Any, str, str]] = [
        (args.checkpoint and args.source, "--checkpoint and --from exclude each other", "both say where to start"),
        (
            args.checkpoint and args.checkpoint.endswith(".onnx"),
            f"{args.checkpoint} is not a checkpoint",
            "it is exported already: start there with --from",
        ),
        (
            args.format and (args.onnx or args.web or args.tune or args.sensitivity or args.max_miou_drop is not None),
            "--format does one thing",
            "it writes --out; leave --onnx, --web, --tune, --sensitivity and --max-miou-drop out",
        ),
        (bool(args.format) != bool(args.out), "--format and --out belong together", "one says how, the other where"),
        (
            args.sensitivity and (args.web or args.onnx),
            "--sensitivity writes no file",
            "it is a table; leave --web and --onnx out, --json keeps it",
        ),
        (
            args.verify_only and (args.precision or args.graph or args.onnx or args.calibration or args.web),
            "--verify-only exports nothing",
            "leave the options of an export out",
        ),
        (
            args.max_miou_drop is not None and args.max_miou_drop < 0,
            "--max-miou-drop is below 0",
            "it is the mIoU that may be lost, in points",
        ),
        (args.tune and args.sensitivity, "--tune and --sensitivity exclude each other", "run one after the other"),
        (args.ort_web and not args.web, "--ort-web does nothing without --web", "it is a part of the page"),
        (
            not args.tune and (args.min_speedup or args.latency_budget or args.runtimes or args.seconds),
            "--min-speedup, --latency-budget, --runtimes and --seconds belong to --tune",
            "nothing else is measured",
        ),
        (
            args.tune and (args.exclude_blocks or args.precision),
            "--tune chooses precision and blocks by itself",
            "leave --precision and --exclude-blocks out",
        ),
        (
            args.data and not (args.tune or args.sensitivity or args.max_miou_drop is not None),
            "--data does nothing here",
            "it belongs to --max-miou-drop, --sensitivity and --tune; photos go to --photos",
        ),
        (
            not args.data and any(value is not None for value in (args.limit, *_scoring(args).values())),
            "--limit, --mode, --resize-to-file and the label options do nothing without --data",
            "they say how to score",
        ),
        (
            not (args.tune or calibrated or (args.sensitivity and not args.precision))
            and (args.calibration or args.calibration_count or args.calibration_method),
            "--calibration does nothing here",
            "only static INT8 measures ranges: add --precision int8",
        ),
        (args.tune and args.calibration_method, "--tune chooses the calibration method", "it takes percentile"),
        (
            not args.data and (args.tune or args.sensitivity or args.max_miou_drop is not None),
            "--data is missing",
            "mIoU is scored on labelled photos: add --data FOLDER (ADE20K layout)",
        ),
        (
            args.max_miou_drop is not None and not args.tune and not by_block(args.precision),
            "--max-miou-drop needs an INT8 precision",
            "blocks go back from INT8 to float: add --precision int8",
        ),
        (
            args.max_miou_drop is not None and args.sensitivity,
            "--max-miou-drop and --sensitivity exclude each other",
            "the first writes a file, the second only a table",
        ),
    ]
    wrong += [
        (
            args.source and getattr(args, name),
            f"--{name.replace('_', '-')} and --from exclude each other",
            "the file exists already; start at --checkpoint to export it differently",
        )
        for name in ONLY_FROM_CHECKPOINT
    ]
    for refused, what, why in wrong:
        if refused:
            raise ConfigError(what, why, "tinymim-export --help lists the options")
    if not (args.checkpoint or args.source):
        raise ConfigError(
            "nothing to start from",
            "--checkpoint names the model, --from an FP32 .onnx made of it before",
            "add --checkpoint segmentor.pth",
        )
    page_only = args.web and args.source and not _reduced(args) and not args.tune
    if args.onnx is None and not (args.verify_only or args.sensitivity or page_only or args.format):
        raise ConfigError("--onnx is missing", "it names the file to write", "add --onnx out.onnx")
    if args.onnx is not None and args.source and not (_reduced(args) or args.tune or args.sensitivity):
        raise ConfigError(
            "nothing to do",
            f"{args.source} is FP32 already",
            "add --precision int8, --graph attention, --tune or --web",
        )
    if args.opset is not None and not 18 <= args.opset <= 23:
        raise ConfigError(
            f"--opset {args.opset} is not possible", "PyTorch's exporter writes 18 to 23", "leave it out (20)"
        )


def _verify(args: argparse.Namespace) -> int:
    """--verify-only."""
    if args.source is not None:
        from tinymim_export.precision.quantize import verify_file

        result = verify_file(args.verify_only, args.source, photos=args.photos, seed=args.seed)
    else:
        from tinymim_export.graph.parity import verify

        result = verify(
            args.verify_only, args.checkpoint, args.config, num_heads=args.num_heads, photos=args.photos, seed=args.seed
        )
        result.print()
    from tinymim_export.runtime.metadata import load_proto, proto_metadata

    print(f"{args.verify_only}: verified")
    _write(args, result)
    print(_next(args.verify_only, proto_metadata(load_proto(args.verify_only)).get("part")))
    return 0


def _next(onnx: str, part: str | None, split: str = "") -> str:
    """What to type after an export or a verification."""
    if part == "tracker":
        return f"next: tinymim track --test {shlex.quote(onnx)} --data SEQUENCES --baseline"
    return f"next: tinymim bench {shlex.quote(onnx)}{split}"


def _export(args: argparse.Namespace, onnx: str, last: bool = True) -> int:
    """The FP32 file of a checkpoint."""
    from tinymim_export.graph.convert import export

    options: dict[str, Any] = {"output": args.output, "opset": args.opset}
    made = export(
        args.checkpoint,
        onnx,
        config=args.config,
        part=args.part,
        size=None if args.size is None else (args.size[0], args.size[1]),
        dynamic=args.dynamic,
        photos=args.photos,
        num_heads=args.num_heads,
        seed=args.seed,
        **_given(options),
    )
    made.print()
    if last:
        _write(args, made)
        print(_next(onnx, made.part, " --split" if made.part == "segmentor" else ""))
    return 0


def _with_fp32(args: argparse.Namespace, action: Any) -> int:
    """Run an action on the FP32 file: the one given, or one exported for it and thrown away afterwards."""
    if args.source is not None:
        return int(action(args, args.source))
    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / f"{Path(args.onnx or args.checkpoint).stem}.fp32.onnx"
        _export(args, str(fp32), last=False)
        return int(action(args, str(fp32)))


def _scoring(args: argparse.Namespace) -> dict[str, Any]:
    """How --data is scored, where that is said."""
    return {
        "mode": args.mode,
        "resize_to_file": args.resize_to_file or None,
        "ignore_label": args.ignore_label,
        "reduce_zero_label": args.reduce_zero_label,
    }


def _scored(args: argparse.Namespace) -> str:
    """The same as it is typed."""
    return spelled(args, "mode", "resize_to_file", "ignore_label", "reduce_zero_label")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given; the others take the function's default."""
    return {name: value for name, value in options.items() if value is not None}


def _calibration(args: argparse.Namespace) -> dict[str, Any]:
    """Options of calibration that were given."""
    given = {"count": args.calibration_count, "method": args.calibration_method, "graph": args.graph}
    return _given(given) | {"calibration": args.calibration, "seed": args.seed}


def _reduce(args: argparse.Namespace, fp32: str) -> int:
    """Another precision, graph variants, or both; within a budget of mIoU where one is given."""
    options = _calibration(args) | {"precision": args.precision or "fp32", "exclude": args.exclude_blocks or ()}
    options["photos"] = args.photos
    if args.max_miou_drop is not None:
        from tinymim_export.precision.sensitivity import quantize_within

        options |= {"max_miou_drop": args.max_miou_drop / 100, "limit": args.limit, "scoring": _given(_scoring(args))}
        made = quantize_within(fp32, args.onnx, data=args.data, **options)
    else:
        from tinymim_export.precision.quantize import quantize

        made = quantize(fp32, args.onnx, **options)
    made.print()
    _write(args, made)
    print(f"next: tinymim bench {shlex.join([args.source, args.onnx] if args.source else [args.onnx])}")
    print(f"next: tinymim eval {shlex.quote(args.onnx)} --data {shlex.quote(args.data or 'FOLDER')}{_scored(args)}")
    return 0


def _format(args: argparse.Namespace, fp32: str) -> int:
    """--format: the file, or one of another precision made of it, in another format."""
    from tinymim_export.formats import Start, convert, find_format

    options = _calibration(args) | {"exclude": args.exclude_blocks or (), "photos": args.photos}
    start = Start(args.checkpoint, args.config, args.part, args.num_heads) if args.checkpoint else None
    made = convert(fp32, args.out, format=args.format, precision=args.precision, start=start, **options)
    made.print()
    _write(args, made)
    print(f"next: tinymim bench {shlex.quote(args.out)} --runtime {find_format(args.format).runtime}")
    return 0


def _sensitivity(args: argparse.Namespace, fp32: str) -> int:
    """--sensitivity: a table of blocks."""
    from tinymim_export.precision.sensitivity import LIMIT, sensitivity

    precision = args.precision or "int8"
    options = _calibration(args) | {"limit": args.limit or LIMIT, "scoring": _given(_scoring(args))}
    result = sensitivity(fp32, args.data, precision=precision, **options)
    result.print()
    _write(args, result)
    start = spelled(args, "source" if args.source else "checkpoint").replace("--source", "--from")
    photos = shlex.quote(args.calibration or args.data)
    photos = f" --calibration {photos}" if PRECISIONS[precision].needs_calibration else ""
    graph = spelled(args, "graph")
    print(
        f"next: tinymim-export{start} --onnx {precision}.onnx --precision {precision}{graph}{photos} "
        f"--data {shlex.quote(args.data)} --max-miou-drop 0.5{_scored(args)}"
    )
    return 0


def _tune(args: argparse.Namespace) -> int:
    """--tune: candidates, verdicts, one winner."""
    from tinymim.models.weight_files import weights_file
    from tinymim_export.tune.search import tune
    from tinymim_export.tune.targets import milliseconds

    given = {
        "max_miou_drop": args.max_miou_drop,
        "min_speedup": args.min_speedup,
        "latency_budget": None if args.latency_budget is None else milliseconds(args.latency_budget),
        "runtimes": args.runtimes,
        "variants": args.graph,
        "seconds": args.seconds,
        "count": args.calibration_count,
        "output": args.output,
    }
    result = tune(
        args.source or weights_file(args.checkpoint),
        args.onnx,
        config=args.config,
        size=None if args.size is None else (args.size[0], args.size[1]),
        data=args.data,
        calibration=args.calibration,
        limit=args.limit,
        seed=args.seed,
        **_given(given | _scoring(args)),
    )
    result.print()
    _write(args, result)
    print("\n".join(f"next: {line}" for line in result.next))
    return 0


def _web(args: argparse.Namespace, onnx: str) -> int:
    """--web: a page around the file."""
    from tinymim_export.web.build import build_web

    made = build_web(onnx, args.web, ort_web=args.ort_web)
    made.print()
    print(f"next: {made.next}")
    return 0


def _write(args: argparse.Namespace, result: Any) -> None:
    """The result's files."""
    if args.json:
        result.to_json(args.json)
    if args.markdown:
        write_text(args.markdown, result.to_markdown())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tinymim-export``."""
    return run_command("tinymim-export", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
