"""Sections of a segmentation run's page: IoU of every class, and the same photos at several validations. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

from tinymim import records
from tinymim.data.label_files import IGNORED
from tinymim.schema import read_json
from tinymim_export.report.figures import WORSE, class_legend, difference_image, legend
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import data_uri, meter

SHOWN = 3  # validations on the page: the first, the best, the last


class Predictions(TypedDict):
    """``predictions/photos.json`` of a run."""

    photos: list[str]
    classes: list[str]
    palette: list[records.Colour]


def class_section(folder: Path) -> Html:
    """IoU of every class by ``result.json``, the best first."""
    path = folder / "result.json"
    if not (folder / "segmentor.pth").is_file() or not path.is_file():
        return html("")
    found = read_json(path, records.Score).get("class_IoU") or {}
    known = sorted(((name, iou) for name, iou in found.items() if iou is not None), key=lambda item: -item[1])
    rows = [html("<tr><td>{}</td><td>{}</td></tr>", name, meter(iou)) for name, iou in known]
    absent = [name for name, iou in found.items() if iou is None]
    rows += [html('<tr><td>{}</td><td class="missing">not in the labels</td></tr>', name) for name in absent]
    return html('<div class="scroll"><table class="iou">{}</table></div>', join(rows)) if rows else html("")


def prediction_section(folder: Path, scores: Sequence[tuple[float, float]]) -> Html:
    """Photo, labels, predictions at some validations, and where the last one is wrong.

    Args:
        folder: Of the run.
        scores: (step, mIoU) of its validations.
    """
    place = folder / "predictions"
    if not (place / "photos.json").is_file() or not scores:
        return html("")
    about = read_json(place / "photos.json", Predictions)
    best = max(scores, key=lambda each: (each[1], -each[0]))
    steps = sorted({int(each[0]) for each in (scores[0], best, scores[-1])})
    miou = {int(step): score for step, score in scores}
    rows, seen = [], np.zeros(256, bool)
    for number, name in enumerate(about["photos"]):
        files = [place / f"{number:02d}_photo.jpg", place / f"{number:02d}_labels.png"]
        made = {step: path for step in steps if (path := place / f"{number:02d}_{step:08d}.png").is_file()}
        if not made or not all(path.is_file() for path in files):
            continue
        labels_HW, last_HW = (_pixels(path) for path in (files[1], list(made.values())[-1]))
        labelled_HW = labels_HW != IGNORED
        share = 100 * ((labels_HW != last_HW) & labelled_HW).sum() / max(labelled_HW.sum(), 1)
        last_seen_HW = np.where(labelled_HW, last_HW, IGNORED)
        for ids_HW in (labels_HW, *map(_pixels, made.values())):
            seen[np.unique(ids_HW)] = True
        photo_HW3 = _pixels(files[0])
        shown = [(name, data_uri(files[0])), ("labels", data_uri(files[1]))]
        shown += [(f"step {step}: {100 * miou[step]:.1f} % mIoU", data_uri(path)) for step, path in made.items()]
        wrong_HW3 = difference_image(photo_HW3, labels_HW, last_seen_HW, labels_HW)
        shown.append((f"wrong: {share:.1f} %", data_uri(wrong_HW3)))
        cells = [html('<div><span>{}</span><img src="{}" alt="{}"></div>', text, uri, text) for text, uri in shown]
        rows.append(html('<div class="course">{}</div>', join(cells)))
    if not rows:
        return html("")
    known = [(about["palette"][i], name) for i, name in enumerate(about["classes"][:256]) if seen[i]]
    return html("{}{}{}", join(rows), class_legend(known), legend((WORSE, "wrong at the last of these steps")))


def _pixels(path: Path) -> np.ndarray:
    """A photo, (H, W, 3), or the ids of a mask, (H, W)."""
    with Image.open(path) as image:
        return np.asarray(image)
