"""``data.html``: what is in a folder of photos and labels, before anything is trained. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim.data.examine import Findings
from tinymim.data.folders import SPLITS
from tinymim.data.label_files import IGNORED
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.errors import DataError
from tinymim_export.report.figures import bars, class_legend
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.page import Section, cards, commands, table, write_report
from tinymim_export.report.plots import data_uri, meter, swatch

PICTURES, WIDTH, CLASSES, SIZES = 10, 480, 60, 8
OVER = 0.55  # of a class's colour over a photo
NAMES = SPLITS | {"all": "labelled"}


def data_page(found: Findings, path: Path, lines: Sequence[str]) -> Path:
    """Write the page.

    Args:
        found: What :func:`tinymim.data.examine.examine` found.
        path: The .html file.
        lines: Commands that come next.
    """
    splits = [split for split in found.pairs if found.pairs[split]]
    labelled = sum(map(len, found.pairs.values()))
    numbers = [("photos", f"{len(found.photos):,}", f"{labelled:,} with labels that can be read", "")]
    numbers += [(NAMES[split], f"{len(found.pairs[split]):,}", "photos with labels", "") for split in splits]
    if found.layout:
        numbers.append(("classes", str(len(found.layout.classes)), f"read from {found.layout.source}", ""))
    bad = len(found.problems)
    verdict = ("training refuses", f"{bad} problem" + "s" * (bad > 1), "see below", "bad")
    numbers.append(
        verdict
        if bad
        else ("training refuses", "nothing", "remarks are below" if found.notes else "and there is no remark", "good")
    )
    problems = join(
        html('<p class="verdict bad">{}.<br>Why: {}.<br>To do: {}.</p>', e.what, e.why, e.fix) for e in found.problems
    )
    notes = join(html('<p class="verdict remark">{}.</p>', note) for note in found.notes)
    pictures, legend = _pictures(found)
    return write_report(
        path,
        found.folder.resolve().name,
        found.summary + ".",
        Section("What is there", [cards(numbers)]),
        Section("What training refuses", [problems]),
        Section("What it may mistake", [notes]),
        Section(
            "Photos", [pictures, legend], "Evenly spread; labels over the photos, what is ignored is left as it is."
        ),
        Section(
            "Classes", [_classes(found, splits)], "Share of the pixels that count, and photos that hold the class."
        ),
        Section("Sizes", [_sizes(found)], "Width and height of the photos, upright."),
        Section("Label files", [table(("kind", "files"), found.kinds.most_common())]),
        Section("Next", [commands([("", line) for line in lines])]),
    )


def _classes(found: Findings, splits: Sequence[str]) -> Html:
    rows = []
    for row in found.classes[:CLASSES]:
        cells: list[object] = [join([swatch(row.colour), row.name])]
        for split in splits:
            cells += [meter(row.shares[split]), f"{row.photos[split]:,}"]
        rows.append(cells)
    if rows:
        shares = [cell for split in splits for cell in (meter(found.ignored[split]), "")]
        rows.append([html('<span class="missing">ignored, of all pixels</span>'), *shares])
    head = ["class", *(text for split in splits for text in (NAMES[split], "photos"))]
    more = len(found.classes) - CLASSES
    return table(head, rows) + (html('<p class="note">and {} more classes</p>', more) if more > 0 else html(""))


def _sizes(found: Findings) -> Html:
    common = found.sizes.most_common(SIZES)
    if not common:
        return html("")
    rest = found.sizes.total() - sum(count for _, count in common)
    rows = [(f"{w} x {h}", float(count), f"{count:,}") for (w, h), count in common]
    rows += [(f"{len(found.sizes) - SIZES} other sizes", float(rest), f"{rest:,}")] * bool(rest)
    return bars("photos of a size", rows)


def _pictures(found: Findings) -> tuple[Html, Html]:
    """Photos under their labels, or alone where there are none; and the legend of the classes in them."""
    pairs: list[tuple[Path, Path | None]] = [pair for each in found.pairs.values() for pair in each]
    if found.layout is None:
        pairs = [(photo, None) for photo in found.photos]
    places = np.unique(((np.arange(PICTURES) + 0.5) / PICTURES * len(pairs)).astype(int)).tolist() if pairs else []
    cells, seen = [], np.zeros(256, bool)
    for photo, label in (pairs[i] for i in places):
        try:
            image = open_photo(photo, at_least=(WIDTH, WIDTH))
        except UnreadablePhoto:
            continue  # told among the remarks
        image.thumbnail((WIDTH, 4 * WIDTH))
        if label is not None and found.layout is not None:
            try:
                ids_HW = found.layout.read_label(label)
            except DataError:
                continue  # told among what is refused
            seen[np.unique(ids_HW)] = True
            image = _under(image, ids_HW, found.layout.palette)
        name = os.path.relpath(photo, found.folder)
        cells.append(html('<div><img src="{}" alt="{}"><span>{}</span></div>', data_uri(image), name, name))
    key = class_legend([(row.colour, row.name) for i, row in enumerate(found.classes[:255]) if seen[i]], CLASSES)
    return html('<div class="overlays">{}</div>', join(cells)) if cells else html(""), key


def _under(photo: Image.Image, ids_HW: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """A photo under its labels, at the photo's size."""
    small_HW = np.asarray(Image.fromarray(ids_HW).resize(photo.size, Image.Resampling.NEAREST))
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    photo_HW3 = np.asarray(photo, np.float32)
    mixed_HW3 = (1 - OVER) * photo_HW3 + OVER * colours[small_HW]
    return Image.fromarray(np.where((small_HW == IGNORED)[..., None], photo_HW3, mixed_HW3).astype(np.uint8))
