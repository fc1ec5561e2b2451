"""Masks whose colours are classes: photos and masks of the same names, and a table of colours where there is one.

The colours are read from ``dataset.json`` (classes, palette, ignore_palette), ``class_dict.csv`` (name,r,g,b) or CVAT's
``labelmap.txt`` (name:r,g,b::); without them from all masks, and a class is called by its colour: "#804080". Masks of
0 and 255 are masks of two colours.
"""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim.data.dataset_json import MOST_CLASSES, read_meaning
from tinymim.data.flat import find_flat
from tinymim.data.formats.base import FIX, Sample, Source, need_folder, register_format, text_of
from tinymim.data.label_files import IGNORED, ColourIds, ids_of_colours
from tinymim.errors import DataError
from tinymim.progress import Progress

Colour = tuple[int, int, int]
RARE = 0.0005  # of the pixels of all masks


@register_format("rgb-masks", "photos and masks in colours; dataset.json, class_dict.csv or labelmap.txt names them")
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read the colours, then every mask by them."""
    need_folder(source, "the photos and their masks")
    flat = find_flat(source)
    if flat.problems:
        raise flat.problems[0]
    if not flat.pairs:
        raise DataError(
            f"no masks in {source}",
            "no photo has a mask of its name, beside it or in masks/, labels/ or annotations/",
            "put photos into images/ and masks into masks/",
        )
    classes, void, notes = _table(source, flat.labels)
    colour_ids = (
        *zip((colour for _, colour in classes), range(len(classes)), strict=True),
        *((c, IGNORED) for c in void),
    )
    samples = [
        Sample(photo, name, split, functools.partial(_ids, mask, colour_ids)) for name, split, photo, mask in flat.pairs
    ]
    return Source(samples, tuple(name for name, _ in classes), tuple(colour for _, colour in classes), notes)


def _ids(mask: Path, colour_ids: ColourIds) -> np.ndarray:
    return ids_of_colours(_rgb(mask), mask, colour_ids)


def _rgb(mask: Path) -> np.ndarray:
    """uint8 (H, W, 3) of a mask of any kind but JPEG.

    Raises:
        DataError: unreadable, or a JPEG.
    """
    try:
        with Image.open(mask) as image:
            jpeg = image.format == "JPEG"
            pixels_HW3 = None if jpeg else np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        raise DataError(f"cannot read the mask {mask}", str(error) or type(error).__name__, "copy it again") from None
    if pixels_HW3 is None:
        raise DataError(
            f"{mask} is a JPEG", "it changes colours along every border", "save masks as PNG where they were made"
        )
    return pixels_HW3


def _table(source: Path, masks: list[Path]) -> tuple[list[tuple[str, Colour]], list[Colour], list[str]]:
    """Classes with their colours, colours that do not count, and notes."""
    if (file := source / "dataset.json").is_file():
        meaning = read_meaning(file)
        if meaning.palette is None:
            raise DataError(
                f"{file} has no palette", "masks in colours are read by it", 'add "palette": [[r, g, b], ...]'
            )
        return [*zip(meaning.classes, meaning.palette, strict=True)], [*meaning.ignore_palette], []
    for name, between in (("class_dict.csv", ","), ("labelmap.txt", ":")):
        if (file := source / name).is_file():
            return _lines(file, between), [], [f"colours are those of {name}"]
    pixels: Counter[int] = Counter()
    progress = Progress("colours", len(masks))
    for i, mask in enumerate(masks, 1):
        progress.update(i)
        rgb = _rgb(mask)[..., :3].astype(np.int32)
        codes, counts = np.unique(rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2], return_counts=True)
        pixels.update(dict(zip(codes.tolist(), counts.tolist(), strict=True)))
        rare = [code for code, count in pixels.items() if count < RARE * pixels.total()]
        if len(pixels) > MOST_CLASSES or len(rare) > max(16, len(pixels) // 2):
            raise DataError(
                f"the masks of {source} have {len(pixels)} colours",
                f"{len(rare)} of them fill less than {RARE:.2%} each: a resize or a JPEG made them up",
                "save the masks again without smoothing; or name the real colours in class_dict.csv: name,r,g,b",
            )
    progress.close()
    if len(pixels) < 2:
        raise DataError(f"the masks of {source} have one colour", "there is nothing to learn", "check the masks")
    colours = [(code >> 16, code >> 8 & 255, code & 255) for code in sorted(pixels)]
    return (
        [(f"#{r:02x}{g:02x}{b:02x}", (r, g, b)) for r, g, b in colours],
        [],
        ["classes are called by their colours; name them in dataset.json, or before in class_dict.csv: name,r,g,b"],
    )


def _lines(file: Path, between: str) -> list[tuple[str, Colour]]:
    """ "name,r,g,b" or "name:r,g,b:parts:actions" a line, after a heading that starts with "#" or "name"."""
    found: list[tuple[str, Colour]] = []
    try:
        for line in text_of(file).splitlines():
            name, _, rest = (part.strip() for part in line.partition(between))
            if not name or name.startswith("#") or name.casefold() in ("name", "class"):
                continue
            r, g, b = (int(value) for value in rest.partition(":")[0].split(",")[:3])
            if not all(0 <= value <= 255 for value in (r, g, b)):
                raise ValueError(f"a colour of {name!r} is not 0 to 255")
            found.append((name, (r, g, b)))
    except ValueError as error:
        raise DataError(f"cannot use {file}", f"it is no list of names and colours ({error})", FIX) from None
    names = [name for name, _ in found]
    if not 2 <= len(set(names)) == len(names) <= MOST_CLASSES:
        raise DataError(f"cannot use {file}", f"it needs 2 to {MOST_CLASSES} different names", FIX)
    return found
