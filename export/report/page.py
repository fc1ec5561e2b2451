"""Reports: one self-contained HTML page per run, from result objects and JSON files. NumPy, Pillow, standard library.

Blocks are functions that return HTML; a :class:`Section` holds some of them; :func:`write_report` writes the page.
The page loads nothing from elsewhere, follows the reader's light or dark setting and fits a phone.
"""

import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import DataError
from tinymim.files import atomic_path, sha256_file
from tinymim.records import read_env
from tinymim.schema import read_lines
from tinymim_export.report.figures import class_legend
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import Series, chart, data_uri, mask_image, number
from tinymim_export.report.segmentation_run import class_section, prediction_section
from tinymim_export.report.style import STYLE
from tinymim_export.report.training_health import NOTE, health_figures, is_health_metric, outlier_verdict

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LONGEST_CONFIG = 2**20  # characters of a config.py on a page
NOT_CURVES = {"step", "iter", "epoch", "time", "data_time", "memory", "eta", "seconds", "images_per_second"}


@dataclass
class Section:
    """A part of the page: a heading, a plain sentence under it, blocks of HTML (empty ones are left out).

    Blocks and cells that are not :class:`~tinymim_export.report.markup.Html` are shown as text.
    """

    title: str
    blocks: Sequence[str]
    note: str = ""

    def html(self) -> Html:
        """The section, or nothing when every block is empty."""
        body = join(self.blocks)
        note = html('<p class="note">{}</p>', self.note) if self.note else ""
        return html("<section><h2>{}</h2>{}{}</section>", self.title, note, body) if body else body


def write_report(path: str | Path, title: str, lead: str, *sections: Section, footer: str = "") -> Path:
    """Write a self-contained page, atomically.

    Args:
        path: The .html file.
        title: Heading and window title.
        lead: One or two sentences under it.
        sections: Shown in this order.
        footer: Last line, small.
    """
    path = Path(path)
    page = html(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>{}</title><style>{}</style></head><body><main>"
        '<h1>{}</h1><p class="lead">{}</p>{}{}</main></body></html>\n',
        POLICY,
        title,
        STYLE,
        title,
        lead,
        join(section.html() for section in sections),
        html("<footer>{}</footer>", footer) if footer else "",
    )
    with atomic_path(path) as part:
        part.write_text(page, "utf-8", "backslashreplace")  # names of files may be no UTF-8
    return path


def cards(items: Iterable[tuple[str, str, str, str]]) -> Html:
    """Headline numbers: (label, value, note, tone), tone "good", "bad" or ""."""
    cells = []
    for label, value, note, tone in items:
        amount, _, unit = value.partition(" ")
        unit = html(" <span>{}</span>", unit) if unit else ""
        cells.append(
            html(
                '<div class="card {}"><small>{}</small><b>{}{}</b><small>{}</small></div>',
                tone,
                label,
                amount,
                unit,
                note,
            )
        )
    return html('<div class="cards">{}</div>', join(cells)) if cells else html("")


def flow(steps: Iterable[tuple[str, Sequence[str]]]) -> Html:
    """The pipeline as boxes and arrows: (name, lines of text)."""
    boxes = [
        html("<div><strong>{}</strong>{}</div>", name, join(html("<span>{}</span>", line) for line in lines))
        for name, lines in steps
    ]
    return html('<div class="flow">{}</div>', join(boxes))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls sideways on a phone.

    Args:
        head: Column names; the first column is left-aligned.
        rows: Cells.
        kind: Class of the style sheet.
    """
    body = join(html("<tr>{}</tr>", join(html("<td>{}</td>", cell) for cell in row)) for row in rows)
    names = join(html("<th>{}</th>", name) for name in head)
    opened = html('<table class="{}">', kind) if kind else html("<table>")
    return html('<div class="scroll">{}<tr>{}</tr>{}</table></div>', opened, names, body) if body else body


def columns(*blocks: str) -> Html:
    """Blocks side by side where the page is wide enough."""
    return html('<div class="two">{}</div>', join(html("<div>{}</div>", block) for block in blocks if block))


def charts(*figures: str) -> Html:
    """Charts in a grid."""
    return html('<div class="charts">{}</div>', join(figures)) if any(figures) else html("")


def commands(items: Iterable[tuple[str, str]]) -> Html:
    """What to type next: (what it does, the command)."""
    return join((html("<div>{}</div><pre>{}</pre>", what, command) for what, command in items))


def gallery(
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    *,
    most_classes: int = 40,
) -> Html:
    """Photo, truth and prediction side by side, with the legend of the classes that occur.

    Args:
        rows: (caption, photo (H, W, 3) uint8, truth (H, W), prediction (H, W)), class ids; those without a colour are
            grey.
        classes: Names.
        palette: RGB 0..255 per class.
        most_classes: Longest legend.
    """
    trios, seen = [], np.zeros(256, bool)
    for caption, photo_HW3, truth_HW, guess_HW in rows:
        seen[np.unique(truth_HW)] = seen[np.unique(guess_HW)] = True
        cells = [html('<span>{}</span><img src="{}" alt="photo">', caption, data_uri(photo_HW3, width=480))]
        for name, mask in (("truth", truth_HW), ("prediction", guess_HW)):
            uri = data_uri(mask_image(mask, palette), width=480)
            cells.append(html('<span>{}</span><img class="mask" src="{}" alt="{}">', name, uri, name))
        trios.append(join(html("<div>{}</div>", cell) for cell in cells))
    if not trios:
        return html("")
    photos = join(html('<div class="trio">{}</div>', trio) for trio in trios)
    known = [(palette[i], name) for i, name in enumerate(classes[:256]) if seen[i]]
    return html('<div class="photos">{}</div>{}', photos, class_legend(known, most_classes))


def verdict(text: str, good: bool) -> Html:
    """One plain sentence (a capital letter and a full stop are added) with a green or red edge."""
    return html('<p class="verdict{}">{}.</p>', "" if good else " bad", text[:1].upper() + text[1:])


def files_table(folder: Path, paths: Iterable[Path]) -> Html:
    """Names relative to ``folder``, sizes and sha256 of files that exist."""
    rows = []
    for path in paths:
        if path.is_file():
            name = os.path.relpath(path, folder)
            size = path.stat().st_size
            text = f"{size / 2**20:.2f} MiB" if size >= 2**17 else f"{size / 2**10:.1f} KiB"
            rows.append((name, text, html("<code>{}</code>", sha256_file(path))))
    return table(("file", "size", "sha256"), rows)


def environment_table(env: dict[str, Any]) -> Html:
    """Processor, cores, platform and package versions of an ``env.json``."""
    rows = [(key, env[key]) for key in ("cpu", "cores", "platform") if key in env]
    return table(("machine", ""), [*rows, *sorted(env.get("versions", {}).items())])


def read_metrics(path: str | Path) -> dict[str, list[tuple[float, float]]]:
    """``metrics.jsonl`` -> one list of (step, value) per numeric name; damaged lines are left out, and said.

    Raises:
        DataError: no such file, or no line of numbers in it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"no {path.name} in {path.parent}", "the run wrote no metrics", "name a run folder that was used"
        )
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in read_lines(path):
        step = record.get("step")
        if isinstance(step, int | float) and math.isfinite(step):
            for name, value in record.items():
                if name not in NOT_CURVES and type(value) in (int, float):
                    curves.setdefault(name, []).append((float(step), float(value)))
    return curves


def is_ratio(name: str) -> bool:
    """Whether a metric is a share (mIoU, accuracy), in 0..1 or in percent."""
    return bool(re.search(r"(?i)iou|acc|top\d|data_wait", name)) and "loss" not in name


def metric_charts(metrics: dict[str, list[tuple[float, float]]]) -> list[Html]:
    """Charts of what moves: a name and its ``val_`` twin share one, ratios such as mIoU are in percent; a metric that
    stays the same has none, nor one that is another's under a longer name."""
    figures, drawn = [], list[list[tuple[float, float]]]()
    for name in sorted(metrics, key=lambda n: (n != "loss", n.endswith("lr"), n.startswith("val_"), n)):
        if name.startswith("val_") and name[4:] in metrics:
            continue
        still = len(metrics[name]) > 1 and len({value for _, value in metrics[name]}) == 1
        if still or metrics[name] in drawn:
            continue
        drawn.append(metrics[name])
        ratio = is_ratio(name)
        few = len(metrics[name]) <= 40 and (ratio or name.startswith("val_"))
        scale = 0.01 if ratio and max(v for _, v in metrics[name]) > 1.001 else 1.0
        rate = name == "lr" or name.endswith("_lr")
        lines = [Series(name, [(x, y * scale) for x, y in metrics[name]], dots=few, exact=rate)]
        if f"val_{name}" in metrics:
            lines = [Series("training", metrics[name]), Series("held out", metrics[f"val_{name}"], dots=True)]
        figures.append(chart(name, lines, percent=ratio))
    return figures


def read_config(folder: Path) -> str:
    """Text of a run's config.py, to be shown; "" without one. Nothing of it is run."""
    path = folder / "config.py"
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(LONGEST_CONFIG)


def hide_paths(text: str) -> str:
    """Absolute paths shortened to their last name: a report may travel, a home folder should not."""
    return re.sub(r"(?<![\w.:/<])(?:/|[A-Za-z]:\\)(?:[^\s'\"/\\<>]+[/\\])+([^\s'\"/\\<>]*)", r".../\1", text)


def here(path: str | Path, report_folder: str | Path) -> str:
    """A path as a word of a command: relative to the working folder, or to the report's if that is outside."""
    relative = os.path.relpath(path)
    near = os.path.relpath(path, report_folder) if relative.startswith("..") else relative
    return shlex.quote(near.replace(os.sep, "/"))


def where_to_run(report_folder: str | Path) -> str:
    """Which folder the commands on the page are meant for."""
    outside = os.path.relpath(report_folder).startswith("..")
    return f"To be typed in {'the folder of this report' if outside else 'the folder the run was started in'}."


SegmentLine = Callable[[Path, str], str]  # file of a student, the word that stands for it -> the command


def segment_any(file: Path, shown: str) -> str:
    """The command that gives a student its head, where its size is not known."""
    return f"tinymim segment CONFIG --data-root FOLDER --student {shown} --work-dir runs/seg"


def run_report(
    run_folder: str | Path,
    *,
    next_commands: Iterable[tuple[str, str]] = (),
    segment: SegmentLine = segment_any,
) -> Path:
    """Write ``report.html`` into a run folder from its config.py, env.json and metrics.jsonl.

    Args:
        run_folder: Folder of a finished (or interrupted) job.
        next_commands: (what it does, command); None given: derived from the files in the folder.
        segment: Says the command that gives a student its segmentation head.

    Raises:
        DataError: the folder holds no metrics.jsonl.
    """
    folder = Path(run_folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = max((int(x) for points in metrics.values() for x, _ in points), default=0)
    env = read_env(folder)
    config = hide_paths(read_config(folder))
    headlines = ("loss", "val_loss", "val_top1", "val_top5", "mIoU", "mAcc", "aAcc", "knn_top1", "linear_top1")
    first = [name for name in headlines if name in metrics]
    headline = []
    for name in first or list(metrics)[:4]:
        start, end = metrics[name][0][1], metrics[name][-1][1]
        if is_ratio(name) and max(abs(start), abs(end)) <= 1:
            start, end = 100 * start, 100 * end
        note = f"from {number(start)}" if math.isfinite(start) and len(metrics[name]) > 1 else ""
        headline.append((name, f"{number(end)} %" if is_ratio(name) else number(end), note, ""))
    kinds = {
        "segmentor.pth": "segmentation run",
        "best_segmentor.pth": "segmentation run",
        "student.pth": "pre-training run",
        "classifier.pth": "fine-tuning run",
        "tracker.pth": "tracking run",
        "detector.pth": "detection run",
    }
    kind = next((text for file, text in kinds.items() if (folder / file).is_file()), "run")
    if kind == kinds["student.pth"] and (env.get("inputs") or {}).get("teacher"):
        kind = "distillation run"
    plain = {name: points for name, points in metrics.items() if not is_health_metric(name)}
    left = [folder / name for name in (*kinds, "config.py", "metrics.jsonl")]
    return write_report(
        folder / "report.html",
        folder.name,
        f"Report of a {kind}: {steps:,} steps.",
        Section("Last values", [cards(headline)]),
        Section("Photos", [prediction_section(folder, metrics.get("mIoU", []))], "Validation photos, evenly spread."),
        Section("Every class", [class_section(folder)], "IoU at the end of the run."),
        Section("Curves", [charts(*metric_charts(plain))], "Faint: every logged step. Strong: moving average."),
        Section(
            "Training health", [outlier_verdict(metrics), *(charts(*row) for row in health_figures(metrics))], NOTE
        ),
        Section("Next", [commands(next_commands or _next_commands(folder, segment))], where_to_run(folder)),
        Section("Files", [files_table(folder, left)]),
        Section(
            "Settings",
            [html("<details><summary>config.py</summary><pre>{}</pre></details>", config) if config else ""],
        ),
        Section("Machine", [environment_table(env)]),
        footer=f"tinymim {env.get('versions', {}).get('tinymim', '')}".strip(),
    )


def _next_commands(folder: Path, segment: SegmentLine) -> list[tuple[str, str]]:
    """Commands that make sense with the files of a run folder."""
    at = here(folder, folder)
    if (folder / "segmentor.pth").is_file():
        best = "best_segmentor.pth" if (folder / "best_segmentor.pth").is_file() else "segmentor.pth"
        return [
            (
                "Export it to ONNX and prove that it gives the same masks",
                f"tinymim-export --onnx {at}/model.onnx --checkpoint {at}/{best}",
            ),
            ("See where its milliseconds go", f"tinymim bench {at}/model.onnx --split"),
        ]
    if (folder / "classifier.pth").is_file():
        return [
            ("Score it again, or on ImageNet-A, -R, -C", f"tinymim eval {at}/classifier.pth --data VAL"),
            ("Train a segmentor on it", segment(folder / "classifier.pth", f"{at}/classifier.pth")),
        ]
    if (folder / "tracker.pth").is_file():
        return [
            (
                "Score it against a template matcher",
                f"tinymim track --test {at}/tracker.pth --data SEQUENCES --baseline",
            )
        ]
    if (folder / "detector.pth").is_file():
        return [
            (
                "Score it on other photos",
                f"tinymim detect --test {at}/detector.pth --data OBJECTS --annotations OBJECTS.json",
            )
        ]
    if (folder / "student.pth").is_file():
        return [
            ("Train a segmentor on it", segment(folder / "student.pth", f"{at}/student.pth")),
            (
                "Use it as the teacher of a smaller student",
                f"tinymim distill --data PHOTOS --teacher {at}/student.pth --out runs/distilled",
            ),
        ]
    return []
