"""Speed and quality of deployment: one segmentor in every precision and runtime, compared with plain exports.

Files: the plain ``torch.onnx.export`` of the PyTorch model, the same weights in MMSegmentation's own VisionTransformer
and Feature2Pyramid with a plain export, and ours in each precision and graph variant; ``--others`` adds files of other
architectures (tools/compare_segmentors.py). Every file runs on every runtime that supports it, all are timed in turn in
one process, and each is scored on the validation photos. A second table does the same for the bare backbone at
``--backbone-size``: time, and cosine of its features on real photos. Existing files and scores are reused.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.benchmarks.deployment_files import CALIBRATION, Candidate, make_files, openvino_compute_types
from tinymim.cli import run_command
from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import environment, sha256_file, write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--checkpoint", required=True, help="segmentor.pth of a ViT with UperNet head")
    parser.add_argument("--data-root", required=True, type=Path, help="labelled folder in ADE20K layout")
    parser.add_argument("--out", type=Path, default=Path("runs/deployment"))
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], metavar="FILE.onnx", help="further files to measure"
    )
    parser.add_argument("--backbone-size", type=int, default=224, help="side of the bare backbone's input, pixels")
    parser.add_argument("--threads", type=int, default=None, help="default: every core of this process")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each candidate's latency")
    parser.add_argument("--limit", type=int, default=None, help="score on the first photos only")


def score(candidate: Candidate, args: argparse.Namespace) -> dict[str, Any]:
    """mIoU of one candidate, cached in its own file."""
    from tinymim_export.runtime.miou import evaluate

    kept = args.out / "scores" / f"{candidate.key.replace(' ', '_')}.json"
    sha = sha256_file(candidate.file)
    if kept.is_file():
        before = json.loads(kept.read_text("utf-8-sig"))
        if before["sha256"] == sha:
            return before
    result = evaluate(
        candidate.file,
        args.data_root,
        runtime=candidate.runtime,
        compute_type=candidate.compute_type,
        threads=args.threads,
        limit=args.limit,
    )
    counts = {key: getattr(result, key).tolist() for key in ("right_IC", "labelled_IC", "predicted_IC")}
    value = {"sha256": sha, "miou": result.miou, "images": result.images, "mode": result.mode, "names": result.names}
    value |= counts
    write_json(kept, value)
    return value


def measure(rows: list[Candidate], args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Open all candidates and time them in turn; returns a description and the milliseconds of each."""
    from tinymim_export.bench.timing import interleave
    from tinymim_export.runtime.engines import open_engine

    engines = [
        open_engine(row.file, runtime=row.runtime, compute_type=row.compute_type, threads=args.threads) for row in rows
    ]
    shapes = [(1, 3, *(side or 0 for side in engine.size)) for engine in engines]
    if any(0 in shape for shape in shapes):
        raise ConfigError("a file has a dynamic size", "all files are compared at one size", "export it with --size")
    times = interleave(
        [engine.timer(shape) for engine, shape in zip(engines, shapes, strict=True)], runs=None, seconds=args.seconds
    )
    about = []
    for row, engine, shape in zip(rows, engines, shapes, strict=True):
        cost = engine.meta.get("cost") or {}
        about.append(
            {
                "name": row.name,
                "file": row.file.name,
                "sha256": engine.sha256,
                "engine": engine.label,
                "shape": shape,
                "threads": engine.threads,
                "mib": row.file.stat().st_size / 2**20,
                "params": cost.get("params"),
                "macs": cost.get("macs"),
            }
        )
    return about, times


def from_jpeg(row: Candidate, args: argparse.Namespace) -> dict[str, Any]:
    """From the photo's file to its mask: ms, and times the network's own time beside it."""
    from tinymim_export.bench.end_to_end import end_to_end

    options = dict(compute_type=row.compute_type, threads=args.threads, seconds=args.seconds)
    (seen,) = end_to_end([row.file], args.data_root / "images" / "validation", runtime=row.runtime, **options).rows
    return {"photo_ms": seen.total_ms, "photo_ratio": seen.ratio}


def backbone(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the bare backbone in every precision and runtime: time, and cosine of its features on real photos."""
    from tinymim_export import export
    from tinymim_export.bench.stats import bootstrap_median
    from tinymim_export.bench.timing import interleave
    from tinymim_export.comparison import cosine
    from tinymim_export.precision.quantize import quantize
    from tinymim_export.runtime.engines import open_engine
    from tinymim_export.runtime.photos import load_photos, normalise

    side, out = args.backbone_size, args.out / "backbone"
    photos = args.data_root / "images"
    fp32 = out / "fp32.onnx"
    if not fp32.is_file():
        from tinymim.models import save_student
        from tinymim.models.backbone import from_config
        from tinymim.seg import load_segmentor

        trained: Any = load_segmentor(args.checkpoint)[0].backbone
        plain = from_config(trained.config)
        own = plain.state_dict()
        plain.load_state_dict({k: v for k, v in trained.state_dict().items() if k in own}, strict=False)
        save_student(plain.eval(), out / "student.pth")
        export(out / "student.pth", fp32, size=(side, side), photos=photos / "training")
    rows = [Candidate("fp32", fp32)]
    for precision in ("int8-dynamic", "int8"):
        file = out / f"{precision}.onnx"
        if not file.is_file():
            options = {"calibration": photos / "training", "count": CALIBRATION} if precision == "int8" else {}
            try:
                quantize(fp32, file, precision=precision, **options)
            except TinyMIMError as error:
                print(f"backbone {precision}: {error.what}; {error.why}")
                continue
        rows.append(Candidate(precision, file))
    rows += [Candidate("fp32", fp32, "openvino", word) for word in openvino_compute_types()]
    engines = [
        open_engine(row.file, runtime=row.runtime, compute_type=row.compute_type, threads=args.threads) for row in rows
    ]
    real = load_photos(photos / "validation", limit=16)
    images = np.stack([normalise(photo, (side, side), engines[0].meta) for photo in real])
    want = [engines[0].run(image[None]).astype(np.float64).ravel() for image in images]
    times = interleave([engine.timer((1, 3, side, side)) for engine in engines], runs=None, seconds=args.seconds)
    made = []
    for row, engine, ms in zip(rows, engines, times, strict=True):
        got = [engine.run(image[None]).astype(np.float64).ravel() for image in images]
        cosines = [cosine(a, b) for a, b in zip(got, want, strict=True)]
        made.append(
            {
                "name": row.name,
                "file": row.file.name,
                "sha256": engine.sha256,
                "engine": engine.label,
                "p50_ms": float(np.median(ms)),
                "p90_ms": float(np.percentile(ms, 90)),
                "interval": bootstrap_median(ms),
                "speedup": float(np.median(times[0]) / np.median(ms)),
                "cosine": min(cosines),
                "photos": len(cosines),
            }
        )
    return made


def from_photo(row: dict[str, Any]) -> list[str]:
    """Two cells: from photo to mask; none in results of before."""
    if "photo_ms" not in row:
        return []
    ratio, low, high = row["photo_ratio"]
    return [f"{row['photo_ms']:.1f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]


def table(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    from tinymim_export.tables import billions, markdown_table, millions
    from tinymim_export.tune.verdict import signed

    env = results["environment"]
    head = [
        "segmentor",
        "runtime",
        "MiB",
        "parameters",
        "multiply-adds",
        "p50 ms",
        "p90",
        "times plain",
        *(["JPEG to mask ms", "times the network"] if "photo_ms" in results["segmentors"][0] else []),
        "mIoU %",
        "change (95 %)",
    ]
    lines = [head]
    for row in results["segmentors"]:
        low, high = row["ratio_interval"]
        from_, to = row["change_interval"]
        change = f"{signed(row['change'])} ({signed(from_)} to {signed(to)})"
        lines.append(
            [
                row["name"],
                row["engine"],
                f"{row['mib']:.1f}",
                millions(row["params"]) if row["params"] else "",
                billions(row["macs"]) if row["macs"] else "",
                f"{row['p50_ms']:.1f}",
                f"{row['p90_ms']:.1f}",
                f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
                *from_photo(row),
                f"{100 * row['miou']:.2f}",
                change if row["same_model"] else "",
            ]
        )
    small = [["backbone", "runtime", "p50 ms", "p90", "times fp32", "cosine"]]
    for row in results["backbone"]:
        small.append(
            [
                row["name"],
                row["engine"],
                f"{row['p50_ms']:.2f}",
                f"{row['p90_ms']:.2f}",
                f"{row['speedup']:.2f}",
                f"{row['cosine']:.6f}",
            ]
        )
    side, shape = results["backbone_size"], "x".join(map(str, results["segmentors"][0]["shape"]))
    first = results["segmentors"][0]
    shas = [["file", "sha256"], *sorted({(row["file"], row["sha256"]) for row in results["segmentors"]})]
    return "\n".join(
        [
            "# Deployment, measured",
            "",
            f"{env['cpu']}, {env['cores']} cores, {first['threads']} threads; "
            + ", ".join(f"{k} {v}" for k, v in env["versions"].items())
            + ".",
            "",
            f"Written by `tools/study_deployment.py`. Input {shape}; all timed in turns in one process; mIoU of each "
            f"file itself on {results['images']} validation photos, logits up-sampled to the photo, then argmax. "
            "Change: mIoU points against tinymim fp32, paired bootstrap over photos.",
            "",
            markdown_table(lines),
            f"The bare backbone at {side}x{side}; cosine: the lowest of "
            f"{results['backbone'][0]['photos']} real photos, features against fp32.",
            "",
            markdown_table(small),
            markdown_table([list(row) for row in shas]),
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Make the files, score and time them, write the tables."""
    from types import SimpleNamespace

    from tinymim_export.bench.stats import bootstrap_median, bootstrap_miou_drop, ratio_interval

    rows = make_files(args)
    scores = [score(row, args) for row in rows]
    about, times = measure(rows, args)
    photos = [from_jpeg(row, args) for row in rows]
    counts = [
        SimpleNamespace(names=s["names"], **{k: np.array(v) for k, v in s.items() if k.endswith("_IC")}) for s in scores
    ]
    base = next(i for i, row in enumerate(rows) if row.name == "tinymim fp32")
    made = []
    for i, (what, ms, seen) in enumerate(zip(about, times, scores, strict=True)):
        ratio, low, high = ratio_interval(times[0], ms)
        same = rows[i].file not in args.others
        drop = bootstrap_miou_drop(counts[base], counts[i]) if same else (0.0, 0.0)
        made.append(
            what
            | photos[i]
            | {
                "p50_ms": float(np.median(ms)),
                "p90_ms": float(np.percentile(ms, 90)),
                "runs": len(ms),
                "p50_interval": bootstrap_median(ms),
                "ratio": ratio,
                "ratio_interval": (low, high),
                "miou": seen["miou"],
                "same_model": same,
                "change": seen["miou"] - scores[base]["miou"],
                "change_interval": (-drop[1], -drop[0]),
            }
        )
    results = {
        "kind": "tinymim.deployment",
        "environment": environment(),
        "images": scores[0]["images"],
        "checkpoint_sha256": sha256_file(args.checkpoint),
        "segmentors": made,
        "backbone_size": args.backbone_size,
        "backbone": backbone(args),
    }
    write_json(args.out / "deployment.json", results)
    write_text(args.out / "deployment.md", table(results))
    print(table(results))
    out = shlex.quote(str(args.out))
    print(f"next: tinymim report {out} --out {out}/report.html")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("study_deployment", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
