"""Photo rows of the report on a lineage: the photos on which a file differs most from its FP32 original. No torch."""

from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.folders import read_layout
from tinymim.data.label_files import wrong_size
from tinymim.data.photo_files import list_photos
from tinymim.data.shards import base
from tinymim.errors import ConfigError, DataError
from tinymim.progress import say
from tinymim_export.report.figures import BETTER, OTHER, WORSE, difference_image, legend
from tinymim_export.report.lineage import BASE, Counts, File, Lineage
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import data_uri, mask_image

LOOKED_AT, SHOWN, FILES = 12, 2, 8  # photos run for each file, photos shown of them, files shown
WIDTH = 360  # pixels of a picture on the page
Photo = tuple[str, Path, Path | None]  # name, photo, label


def photo_rows(lineage: Lineage, folder: Path, **reading: Any) -> tuple[Html, str]:
    """HTML of photo, original's mask, the file's mask and their difference, and the sentence above it.

    Args:
        lineage: Joined; files need their paths.
        folder: Labelled folder in ADE20K layout, or any folder of photos.
        reading: See :func:`tinymim.data.folders.read_layout`.

    Raises:
        DataError: no photos.
        ConfigError: nothing to compare.
    """
    pairs = [
        (original, file)
        for file in lineage.files
        if file.role == "onnx"
        and file.path
        and file.output != "features"
        and (original := lineage.reference(file)) is not None
        and original.path
        and original is not file
    ]
    if not pairs:
        raise ConfigError(
            "--data has nothing to compare",
            "no .onnx was given together with the FP32 file it stands for",
            "add the FP32 .onnx of the same checkpoint, or leave --data out",
        )
    all_pairs = len(pairs)
    pairs = list({(file.kind, lineage.checkpoint(file)): (original, file) for original, file in pairs[::-1]}.values())[
        ::-1
    ]
    pairs = [(a, b) for a, b in pairs if b.kind != a.kind] or pairs
    photos, layout = _photos(folder, **reading)
    for _, file in pairs:
        if layout is not None and file.palette and len(file.palette) != len(layout.classes):
            raise DataError(
                f"{file.name} knows {len(file.palette)} classes, {folder} has {len(layout.classes)}",
                "the segmentor was trained on other data",
                "give the folder it was trained for, or a folder of photos without labels",
            )
    masks: dict[str, _Masks] = {}
    blocks, stretched = [], False
    for original, file in pairs[:FILES]:
        say(f"comparing masks: {file.name} with {original.name}")
        sides = [masks.setdefault(f.sha256, _Masks(f)) for f in (original, file)]
        names = sides[1].predictor.classes
        order = layout.match(file.name, names)[0] if layout is not None and names else None
        ranked = []
        for photo in _promising(lineage, original, file, photos):
            first, second = (side.of(photo[1]) for side in sides)
            ranked.append((float((first != second).mean()), photo, first, second))
        ranked.sort(key=lambda item: (-item[0], item[1][0]))
        stretched = stretched or any(side.predictor.stretch for side in sides)
        mean = 100 * float(np.mean([item[0] for item in ranked]))
        blocks.append(html("<h3>{} ({})</h3>", file.name, file.kind))
        blocks.append(
            html('<p class="note">{:.2f} % of the pixels differ over {} photos looked at.</p>', mean, len(ranked))
        )
        for share, (name, path, label), first, second in ranked[:SHOWN]:
            truth = None
            if layout is not None and label is not None:
                truth = layout.read_label(label)
                if truth.shape != first.shape:
                    raise wrong_size(label, truth.shape[::-1], first.shape[::-1])
                if order is not None:
                    truth = np.argsort(order).astype(np.uint8)[truth]
            if share > 0:
                blocks.append(_row(f"{name}: {100 * share:.2f} % differ", path, first, second, truth, file))
        if original.sha256 != pairs[0][0].sha256:
            masks.pop(original.sha256, None)
        masks.pop(file.sha256, None)
    how = ", stretched to the size of the file" if stretched else ""
    left = all_pairs - len(pairs[:FILES])
    more = f" One file of each precision and graph; {left} more not shown." if left else ""
    known = [(WORSE, "the FP32 file was right"), (BETTER, "this file is right")] if layout is not None else []
    keys = legend(*known, (OTHER, "differ, neither is right or nobody knows"))
    return join(
        [keys, *blocks]
    ), f"Photos of {folder.name} on which the masks differ most, run by ONNX Runtime{how}.{more}"


class _Masks:
    """Masks of one file, remembered. Where its contract leads to another size than its own, photos are stretched."""

    def __init__(self, file: File) -> None:
        from tinymim_export.runtime.predictor import Predictor

        assert file.path is not None
        self.predictor, self.known = Predictor(file.path), dict[Path, np.ndarray]()

    def of(self, path: Path) -> np.ndarray:
        """Class ids at the photo's size."""
        from tinymim_export.runtime.predictor import Predictor, read_photo

        if path not in self.known:
            photo = read_photo(path)
            try:
                self.known[path] = self.predictor.mask(photo)
            except ConfigError:
                if self.predictor.stretch:
                    raise
                self.predictor = Predictor(engine=self.predictor.engine, resize_to_file=True)
                self.known[path] = self.predictor.mask(photo)
        return self.known[path]


def _photos(folder: Path, **reading: Any) -> tuple[list[Photo], Any]:
    """Validation photos of a labelled folder with their labels, or the photos of any folder."""
    if (folder / "images").is_dir():
        layout = read_layout(folder, **reading)
        pairs = layout.val or layout.train
        below = folder / "images" / ("validation" if layout.val else "training")
        return [(p.relative_to(below).with_suffix("").as_posix(), p, label) for p, label in pairs], layout
    return [
        (p.relative_to(base(folder)).with_suffix("").as_posix(), p, None) for p in list_photos(folder, shards=False)
    ], None


def _promising(lineage: Lineage, original: File, file: File, photos: list[Photo]) -> list[Photo]:
    """The photos to look at: by their scores, those whose class areas differ most; without scores, evenly spread ones.

    Half the sum of the differences in predicted area is the least number of pixels that differ.
    """
    counts: list[Counts | None] = [
        next((s.counts for s in lineage.scores if s.sha256 == f.sha256 and s.engine == BASE), None)
        for f in (original, file)
    ]
    first, second = counts
    if first is not None and second is not None and first.names == second.names:
        least = np.abs(first.predicted_IC - second.predicted_IC).sum(1)
        order = [first.names[i] for i in np.argsort(-least, kind="stable")]
        by_name = {name: (name, path, label) for name, path, label in photos}
        known = [by_name[name] for name in order if name in by_name]
        if known:
            return known[:LOOKED_AT]
    places = np.unique(((np.arange(LOOKED_AT) + 0.5) / LOOKED_AT * len(photos)).astype(int))
    return [photos[i] for i in places]


def _row(
    caption: str, path: Path, first_HW: np.ndarray, second_HW: np.ndarray, truth_HW: np.ndarray | None, file: File
) -> Html:
    """Four pictures in a row."""
    from tinymim_export.runtime.predictor import read_photo

    photo = read_photo(path)
    palette = file.palette or [[(37 * i) % 256, (91 * i + 80) % 256, (151 * i + 160) % 256] for i in range(256)]
    pictures = [
        ("photo", data_uri(photo, width=WIDTH)),
        ("FP32", data_uri(mask_image(first_HW, palette), width=WIDTH)),
        (file.kind or "this file", data_uri(mask_image(second_HW, palette), width=WIDTH)),
        ("difference", data_uri(difference_image(photo, first_HW, second_HW, truth_HW), width=WIDTH)),
    ]
    cells = []
    for name, uri in pictures:
        kind = html(' class="mask"') if uri.startswith("data:image/png") else ""
        cells.append(html('<div><img{} src="{}" alt="{}"><span>{}</span></div>', kind, uri, name, name))
    return html('<p class="note">{}</p><div class="quad">{}</div>', caption, join(cells))
