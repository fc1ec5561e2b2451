"""Reports: one self-contained HTML page per run, from result objects and JSON files. NumPy, Pillow, standard library.

Blocks are functions that return HTML; a :class:`Section` holds some of them; :func:`write_report` writes the page.
The page loads nothing from elsewhere, follows the reader's light or dark setting and fits a phone.
"""

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import DataError
from tinymim.files import atomic_path, sha256_file
from tinymim_export.report.plots import Series, chart, data_uri, escape, mask_image, number, swatch
from tinymim_export.report.style import STYLE
from tinymim_export.report.training_health import NOTE, health_figures, is_health_metric, outlier_verdict

NOT_CURVES = {"step", "iter", "epoch", "time", "data_time", "memory", "eta", "seconds", "images_per_second"}


@dataclass
class Section:
    """A part of the page: a heading, a plain sentence under it, blocks of HTML (empty ones are left out)."""

    title: str
    blocks: Sequence[str]
    note: str = ""

    def html(self) -> str:
        """The section, or nothing when every block is empty."""
        body = "".join(self.blocks)
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f"<section><h2>{escape(self.title)}</h2>{note}{body}</section>" if body else ""


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
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        + "".join(section.html() for section in sections)
        + (f"<footer>{escape(footer)}</footer>" if footer else "")
        + "</main></body></html>\n"
    )
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def cards(items: Iterable[tuple[str, str, str, str]]) -> str:
    """Headline numbers: (label, value, note, tone), tone "good", "bad" or ""."""
    cells = []
    for label, value, note, tone in items:
        amount, _, unit = value.partition(" ")
        unit = f" <span>{escape(unit)}</span>" if unit else ""
        cells.append(
            f'<div class="card {escape(tone)}"><small>{escape(label)}</small><b>{escape(amount)}{unit}</b>'
            f"<small>{escape(note)}</small></div>"
        )
    return f'<div class="cards">{"".join(cells)}</div>' if cells else ""


def flow(steps: Iterable[tuple[str, Sequence[str]]]) -> str:
    """The pipeline as boxes and arrows: (name, lines of text)."""
    boxes = [
        f"<div><strong>{escape(name)}</strong>{''.join(f'<span>{escape(line)}</span>' for line in lines)}</div>"
        for name, lines in steps
    ]
    return f'<div class="flow">{"".join(boxes)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, raw: bool = False) -> str:
    """A table that scrolls sideways on a phone.

    Args:
        head: Column names; the first column is left-aligned.
        rows: Cells; text that is no number is escaped unless ``raw``.
        raw: Cells hold HTML already.
    """
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if raw else escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>{body}</table></div>' if body else ""


def columns(*blocks: str) -> str:
    """Blocks side by side where the page is wide enough."""
    return f'<div class="two">{"".join(f"<div>{block}</div>" for block in blocks if block)}</div>'


def charts(*figures: str) -> str:
    """Charts in a grid."""
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def commands(items: Iterable[tuple[str, str]]) -> str:
    """What to type next: (what it does, the command)."""
    return "".join(f"<div>{escape(what)}</div><pre>{escape(command)}</pre>" for what, command in items)


def gallery(
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    *,
    most_classes: int = 40,
) -> str:
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
        cells = [f'<span>{escape(caption)}</span><img src="{data_uri(photo_HW3, width=480)}" alt="photo">']
        for name, mask in (("truth", truth_HW), ("prediction", guess_HW)):
            uri = data_uri(mask_image(mask, palette), width=480)
            cells.append(f'<span>{name}</span><img class="mask" src="{uri}" alt="{name}">')
        trios.append("".join(f"<div>{cell}</div>" for cell in cells))
    if not trios:
        return ""
    names = [f"<span>{swatch(palette[i])}{escape(name)}</span>" for i, name in enumerate(classes[:256]) if seen[i]]
    left_out = f"<span>and {len(names) - most_classes} more</span>" if len(names) > most_classes else ""
    photos = "".join(f'<div class="trio">{trio}</div>' for trio in trios)
    return f'<div class="photos">{photos}</div><div class="legend">{"".join(names[:most_classes])}{left_out}</div>'


def verdict(text: str, good: bool) -> str:
    """One plain sentence (a capital letter and a full stop are added) with a green or red edge."""
    return f'<p class="verdict{"" if good else " bad"}">{escape(text[:1].upper() + text[1:])}.</p>'


def files_table(folder: Path, paths: Iterable[Path]) -> str:
    """Names relative to ``folder``, sizes and sha256 of files that exist."""
    rows = []
    for path in paths:
        if path.is_file():
            name = escape(os.path.relpath(path, folder))
            size = path.stat().st_size
            text = f"{size / 2**20:.2f} MiB" if size >= 2**17 else f"{size / 2**10:.1f} KiB"
            rows.append((name, text, f"<code>{sha256_file(path)}</code>"))
    return table(("file", "size", "sha256"), rows, raw=True)


def environment_table(env: dict[str, Any]) -> str:
    """Processor, cores, platform and package versions of an ``env.json``."""
    rows = [(key, env[key]) for key in ("cpu", "cores", "platform") if key in env]
    return table(("machine", ""), [*rows, *sorted(env.get("versions", {}).items())])


def read_metrics(path: str | Path) -> dict[str, list[tuple[float, float]]]:
    """``metrics.jsonl`` -> one list of (step, value) per numeric name; a half-written last line is left out.

    Raises:
        DataError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"no {path.name} in {path.parent}", "the run wrote no metrics", "name a run folder that was used"
        )
    curves: dict[str, list[tuple[float, float]]] = {}
    for text in path.read_text("utf-8-sig").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(text)
            step = record.get("step")
            for name, value in record.items():
                if name not in NOT_CURVES and type(value) in (int, float) and step is not None:
                    curves.setdefault(name, []).append((float(step), float(value)))
    return curves


def is_ratio(name: str) -> bool:
    """Whether a metric is a share (mIoU, accuracy), in 0..1 or in percent."""
    return bool(re.search(r"(?i)iou|acc|top\d", name)) and "loss" not in name


def metric_charts(metrics: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Charts of any metrics: a name and its ``val_`` twin share one, ratios such as mIoU are in percent."""
    figures = []
    for name in sorted(metrics, key=lambda n: (n != "loss", n.endswith("lr"), n.startswith("val_"), n)):
        if name.startswith("val_") and name[4:] in metrics:
            continue
        ratio = is_ratio(name)
        few = len(metrics[name]) <= 40 and (ratio or name.startswith("val_"))
        scale = 0.01 if ratio and max(v for _, v in metrics[name]) > 1.001 else 1.0
        rate = name == "lr" or name.endswith("_lr")
        lines = [Series(name, [(x, y * scale) for x, y in metrics[name]], dots=few, exact=rate)]
        if f"val_{name}" in metrics:
            lines = [Series("training", metrics[name]), Series("held out", metrics[f"val_{name}"], dots=True)]
        figures.append(chart(name, lines, percent=ratio))
    return figures


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


def run_report(run_folder: str | Path, *, next_commands: Iterable[tuple[str, str]] = ()) -> Path:
    """Write ``report.html`` into a run folder from its config.py, env.json and metrics.jsonl.

    Args:
        run_folder: Folder of a finished (or interrupted) job.
        next_commands: (what it does, command); None given: derived from the files in the folder.

    Raises:
        DataError: the folder holds no metrics.jsonl.
    """
    folder = Path(run_folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = max((int(x) for points in metrics.values() for x, _ in points), default=0)
    env = json.loads((folder / "env.json").read_text("utf-8-sig")) if (folder / "env.json").is_file() else {}
    config = hide_paths((folder / "config.py").read_text("utf-8-sig")) if (folder / "config.py").is_file() else ""
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
        "student.pth": "pre-training run",
        "classifier.pth": "fine-tuning run",
    }
    kind = next((text for file, text in kinds.items() if (folder / file).is_file()), "run")
    if kind == kinds["student.pth"] and (env.get("inputs") or {}).get("teacher"):
        kind = "distillation run"
    plain = {name: points for name, points in metrics.items() if not is_health_metric(name)}
    files = ("segmentor.pth", "student.pth", "classifier.pth", "config.py", "metrics.jsonl")
    left = [folder / name for name in files]
    return write_report(
        folder / "report.html",
        folder.name,
        f"Report of a {kind}: {steps:,} steps.",
        Section("Last values", [cards(headline)]),
        Section("Curves", [charts(*metric_charts(plain))], "Faint: every logged step. Strong: moving average."),
        Section(
            "Training health", [outlier_verdict(metrics), *(charts(*row) for row in health_figures(metrics))], NOTE
        ),
        Section("Next", [commands(next_commands or _next_commands(folder))], where_to_run(folder)),
        Section("Files", [files_table(folder, left)]),
        Section(
            "Settings",
            [f"<details><summary>config.py</summary><pre>{escape(config)}</pre></details>" if config else ""],
        ),
        Section("Machine", [environment_table(env)]),
        footer=f"tinymim {env.get('versions', {}).get('tinymim', '')}".strip(),
    )


def _next_commands(folder: Path) -> list[tuple[str, str]]:
    """Commands that make sense with the files of a run folder."""
    at = here(folder, folder)
    if (folder / "segmentor.pth").is_file():
        return [
            (
                "Export it to ONNX and prove that it gives the same masks",
                f"tinymim-export --onnx {at}/model.onnx --checkpoint {at}/segmentor.pth",
            ),
            ("See where its milliseconds go", f"tinymim bench {at}/model.onnx --split"),
        ]
    if (folder / "classifier.pth").is_file():
        return [
            ("Score it again, or on ImageNet-A, -R, -C", f"tinymim eval {at}/classifier.pth --data VAL"),
            (
                "Train a segmentor on it",
                "tinymim segment upernet_tinymim_t_light "
                f"--data-root FOLDER --work-dir runs/seg --student {at}/classifier.pth",
            ),
        ]
    if (folder / "student.pth").is_file():
        return [
            (
                "Train a segmentor on it",
                "tinymim segment upernet_tinymim_t_light "
                f"--data-root FOLDER --work-dir runs/seg --student {at}/student.pth",
            ),
            (
                "Use it as the teacher of a smaller student",
                f"tinymim distill --data PHOTOS --teacher {at}/student.pth --out runs/distilled",
            ),
        ]
    return []
