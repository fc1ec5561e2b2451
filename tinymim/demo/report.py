"""The end of the demo: the ONNX file scored on the validation photos, and the page that shows the whole pipeline.

Everything on the page comes from ``demo.json``, the stages' ``metrics.jsonl`` and the pictures next to them.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinymim.confusion import class_counts, confusion_matrix, mean_iou
from tinymim.data.folders import IGNORED, read_layout
from tinymim.data.pixels import open_photo
from tinymim.demo.evidence import comparison, evidence, evidence_note
from tinymim.progress import clock
from tinymim_export.report.markup import Html, html
from tinymim_export.report.page import (
    Section,
    cards,
    charts,
    columns,
    commands,
    environment_table,
    files_table,
    flow,
    gallery,
    here,
    read_metrics,
    table,
    verdict,
    where_to_run,
    write_report,
)
from tinymim_export.report.plots import Series, chart, mask_image, meter, stacked_bar, swatch
from tinymim_export.runtime.engines.base import provider_word

SHOWN = 6  # validation photos on the page


def score_onnx(out: Path) -> dict[str, Any]:
    """Run ``segmentor.onnx`` over the validation photos; keep some predictions as ``predictions/*.png``.

    Returns:
        ``mIoU`` (0 to 1), ``images``, ``shown``: (share of correct pixels, photo), evenly spread from good to bad.
    """
    import onnxruntime as ort

    from tinymim_export.runtime.metadata import read_metadata
    from tinymim_export.runtime.sessions import PROVIDERS

    layout = read_layout(out / "data")
    session = ort.InferenceSession(str(out / "segmentor.onnx"), providers=[PROVIDERS["cpu"].title])
    meta, count = read_metadata(session), len(layout.classes)
    mean, std = (np.array(meta[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    confusion, scored = np.zeros((count, count), np.int64), []
    (out / "predictions").mkdir(exist_ok=True)
    for photo_path, label_path in layout.val:
        photo_3HW = np.asarray(open_photo(photo_path), np.float32).transpose(2, 0, 1)
        logits_1CHW = session.run(None, {"image": ((photo_3HW - mean) / std)[None]})[0]
        guess_HW, truth_HW = logits_1CHW[0].argmax(0), layout.read_label(label_path)
        own = confusion_matrix(truth_HW, guess_HW, count, IGNORED)
        confusion += own
        scored.append((float(np.trace(own) / max(own.sum(), 1)), photo_path.stem))
        mask_image(guess_HW, layout.palette).save(out / "predictions" / f"{photo_path.stem}.png")
    ranked = sorted(scored, reverse=True)
    miou = float(mean_iou(*class_counts(confusion))) if confusion.any() else 0.0  # NaN is no JSON
    places = np.unique(((np.arange(SHOWN) + 0.5) / SHOWN * len(ranked)).astype(int))
    return {"mIoU": miou, "images": len(ranked), "shown": [ranked[i] for i in places]}


def next_commands(out: Path, data: str | None) -> list[tuple[str, str]]:
    """What to run after the demo: (purpose, command)."""
    folder = shlex.quote(data) if data else "FOLDER"
    photos = shlex.quote(f"{data}/images/training") if data else "PHOTOS"
    return [
        (
            "Distil on your own photos",
            f"tinymim distill --recipe tinymim_tiny_small_data --data {photos} --out runs/student",
        ),
        (
            "Train a segmentor on that student",
            "tinymim segment linear_tinymim_t_small_data "
            f"--data-root {folder} --student runs/student/student.pth --work-dir runs/segmentor",
        ),
        (
            "Export and verify it",
            "tinymim-export --onnx runs/segmentor/segmentor.onnx --checkpoint runs/segmentor/segmentor.pth",
        ),
        ("Measure any .onnx file on this machine", f"tinymim bench {shlex.quote(str(out))}/segmentor.onnx --split"),
    ]


def write_demo_report(out: Path, record: dict[str, Any]) -> Path:
    """Write ``report.html`` from ``demo.json``'s content.

    Args:
        out: Folder of the demo.
        record: Content of ``demo.json``, all stages done.
    """
    stages, env = record["stages"], record["environment"]
    data, seg, made, measured = (stages[key] for key in ("data", "segmentor", "export", "measure"))
    width, height = data["size"]
    given = record["settings"]["data"]
    lead = (
        f"A segmentor from nothing but {data['train']} {data['source']}, in {record['seconds'] / 60:.1f} minutes "
        f"on {env['cores']} cores: a teacher learns to predict masked patches, a smaller student learns the teacher's "
        "token relations, UperNet learns the classes, and the exported file is compared with the trained model."
    )
    where = where_to_run(out)
    steps = [
        (what, command.replace(shlex.quote(str(out)), here(out, out))) for what, command in next_commands(out, given)
    ]
    return write_report(
        out / "report.html",
        "tinymim demo",
        lead,
        Section("What a distilled student wins", [evidence(shown := comparison())], evidence_note(shown)),
        Section(
            "This demo in numbers",
            [_headline(record), *(verdict(text, good) for text, good in record["checks"].items())],
        ),
        Section("What happened", [_pipeline(stages)]),
        Section(
            "What it sees",
            [_pictures(out, data, measured["onnx"]["shown"])],
            "Validation photos, evenly spread from good to bad, with their share of correct pixels. The predictions "
            f"are those of the exported file in ONNX Runtime at {width}x{height} pixels.",
        ),
        Section("How it learned", [_curves(out)], "Faint: every step. Strong: moving average. Dots: held-out photos."),
        Section("Classes", [_classes(seg, data)], f"Intersection over union on {seg['images']} validation photos."),
        Section("Where the milliseconds go", _latency(measured), _latency_note(measured)),
        Section(
            "Does the ONNX file match PyTorch?",
            [_parity(made)],
            "Checked at every export; a file that fails is not written. Relative: relative to the largest value.",
        ),
        Section("What to run next", [commands(steps)], where),
        Section(
            "Files",
            [
                files_table(
                    out,
                    [
                        out / "segmentor.onnx",
                        out / "segmentor" / "segmentor.pth",
                        out / "student" / "student.pth",
                        out / "teacher" / "student.pth",
                    ],
                )
            ],
        ),
        Section("Machine", [environment_table(env)]),
        footer=f"tinymim {env['versions'].get('tinymim', '')}, seed {record['settings']['seed']}. Every number on this "
        "page comes from demo.json and the metrics.jsonl files next to it.",
    )


def _headline(record: dict[str, Any]) -> Html:
    stages = record["stages"]
    seg, row, made = stages["segmentor"], stages["measure"]["rows"][0], stages["export"]
    times = seg["mIoU"] / seg["constant_mIoU"]
    equal, good = made["parity"]["summary"]["equal_pixels"], record["checks"]
    return cards(
        [
            (
                "mIoU",
                f"{100 * seg['mIoU']:.1f} %",
                f"{times:.0f} times the best constant prediction ({100 * seg['constant_mIoU']:.1f} %)",
                "good" if next(iter(good.values())) else "bad",
            ),
            ("correct pixels", f"{100 * seg['aAcc']:.1f} %", "all validation pixels", ""),
            (
                "one photo, ONNX Runtime",
                f"{row['p50_ms']:.1f} ms",
                f"median; p95 {row['p95_ms']:.1f} ms, {row['threads']} threads",
                "",
            ),
            (
                "same pixels as PyTorch",
                f"{100 * equal:.2f} %",
                f"largest relative error {made['parity']['summary']['relative_error']:.0e}",
                "good" if made["parity"]["passed"] else "bad",
            ),
            ("deployed file", f"{row['file_mib']:.1f} MiB", f"{_parameters(made) / 1e6:.1f} M parameters, float32", ""),
            (
                "time for everything",
                f"{record['seconds'] / 60:.1f} min",
                f"peak memory {record['peak_mib'] / 1024:.1f} GiB",
                "",
            ),
        ]
    )


def _parameters(made: dict[str, Any]) -> int:
    return sum(part["params"] for part in made["cost"]["parts"].values())


def _pipeline(stages: dict[str, Any]) -> Html:
    data, teacher, student, seg = (stages[key] for key in ("data", "teacher", "student", "segmentor"))
    made, row = stages["export"], stages["measure"]["rows"][0]

    def vit(stage: dict[str, Any]) -> list[str]:
        shape = stage["shape"]
        return [
            f"{shape['depth']} blocks, {shape['embed_dim']} wide",
            f"{stage['parameters'] / 1e6:.1f} M parameters",
            f"{stage['steps']} steps",
        ]

    def took(name: str) -> str:
        return clock(stages[name]["seconds"])

    return flow(
        [
            (
                "Photos",
                [
                    f"{data['train']} for training",
                    f"{data['val']} for validation",
                    f"{len(data['classes'])} classes",
                    took("data"),
                ],
            ),
            ("Teacher", ["masked autoencoder", *vit(teacher), took("teacher")]),
            ("Student", ["TinyMIM relations", *vit(student), took("student")]),
            ("Segmentor", ["UperNet", f"{seg['steps']} steps", f"mIoU {100 * seg['mIoU']:.1f} %", took("segmentor")]),
            ("ONNX", [f"{row['file_mib']:.1f} MiB", f"{len(made['parity']['rows'])} checks passed", took("export")]),
            ("Measured", [f"{row['p50_ms']:.1f} ms per photo", f"{row['peak_mib']:.0f} MiB memory", took("measure")]),
        ]
    )


def _pictures(out: Path, data: dict[str, Any], shown: list[tuple[float, str]]) -> Html:
    layout = read_layout(out / "data")
    pairs = {photo.stem: (photo, label) for photo, label in layout.val}
    rows = []
    for score, stem in shown:
        photo, label = pairs[stem]
        guess = np.asarray(Image.open(out / "predictions" / f"{stem}.png"))
        caption = f"{100 * score:.0f} % correct"
        rows.append((caption, np.asarray(open_photo(photo)), layout.read_label(label), guess))
    return gallery(rows, data["classes"], data["palette"])


def _curves(out: Path) -> Html:
    figures = []
    for folder, title in (
        ("teacher", "Teacher: error on masked patches"),
        ("student", "Student: relation loss"),
        ("segmentor", "Segmentor: cross entropy"),
    ):
        metrics = read_metrics(out / folder / "metrics.jsonl")
        lines = [Series("training", metrics["loss"])]
        if "val_loss" in metrics:
            lines.append(Series("held out", metrics["val_loss"], dots=True))
        figures.append(chart(title, lines))
        if folder == "student":
            parts = [Series(name, metrics[key]) for key, name in (("qk", "Q-K"), ("vv", "V-V")) if key in metrics]
            figures.append(chart("Student: the two relations", parts))
    return charts(*figures)


def _classes(seg: dict[str, Any], data: dict[str, Any]) -> Html:
    colours = dict(zip(data["classes"], data["palette"], strict=True))
    found = [(name, iou) for name, iou in seg["class_IoU"].items() if iou is not None]
    rows = [
        (html("{}{}", swatch(colours[name]), name), meter(iou))
        for name, iou in sorted(found, key=lambda pair: -pair[1])
    ]
    half = -(-len(rows) // 2)
    head = ("class", "IoU")
    return columns(table(head, rows[:half]), table(head, rows[half:]))


def _latency(measured: dict[str, Any]) -> list[Html]:
    split, row = measured["splits"][0], measured["rows"][0]
    bar = stacked_bar([(part["part"], part["ms"], f"{part['ms']:.2f} ms") for part in split["rows"]])
    parts = table(
        ("part", "parameters", "multiply-adds", "p50 ms", "share"),
        [
            (
                part["part"],
                f"{part['params'] / 1e6:.2f} M",
                f"{part['macs'] / 1e6:,.0f} M",
                f"{part['ms']:.2f}",
                f"{100 * part['share']:.0f} %",
            )
            for part in split["rows"]
        ],
    )
    times = table(
        ("file", "p50 ms", "p90", "p95", "p99", "photos/s", "peak MiB", "threads"),
        [
            (
                Path(row["file"]).name,
                *(f"{row[f'p{p}_ms']:.1f}" for p in (50, 90, 95, 99)),
                f"{row['images_per_s']:.0f}",
                f"{row['peak_mib']:.0f}",
                row["threads"],
            )
        ],
    )
    remarks = [verdict(text, not text.startswith("warning")) for text in split["remarks"]]
    return [bar, parts, *remarks, html("<br>"), times]


def _latency_note(measured: dict[str, Any]) -> str:
    row, split = measured["rows"][0], measured["splits"][0]
    return (
        f"ONNX Runtime, {provider_word(row['provider']).upper()}, {row['threads']} threads, input "
        f"{'x'.join(map(str, row['shape']))}. The parts, timed separately, add up to {100 * split['ratio']:.0f} % of "
        "the whole."
    )


def _parity(made: dict[str, Any]) -> Html:
    rows = []
    for row in made["parity"]["rows"]:
        mark = html('<span class="ok">&#10003;</span>') if row["passed"] else html('<span class="fail">&#10007;</span>')
        cells = [html("{} {}", mark, row["name"]), "x".join(map(str, row["shape"])), row["source"]]
        for key in ("max_error", "relative_error"):
            cells.append("" if row.get(key) is None else f"{row[key]:.1e}")
        cells.append("" if row.get("cosine") is None else f"{row['cosine']:.7f}")
        cells.append("" if row.get("equal_pixels") is None else f"{100 * row['equal_pixels']:.3f} %")
        rows.append(cells)
    head = ("output", "input", "on", "largest error", "relative", "cosine", "equal pixels")
    return table(head, rows)
