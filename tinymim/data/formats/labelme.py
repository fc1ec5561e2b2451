"""LabelMe's JSON files beside their photos: polygons, rectangles, circles and lines in pixels.

Our own few lines: the tool is under the GPL, its files are data. A shape of points or lines has no area and is refused.
"""

import functools
import math
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import numpy as np

from tinymim.data.formats.base import (
    FIX,
    Sample,
    Source,
    class_ids,
    need_folder,
    paint,
    photos_by_stem,
    register_format,
)
from tinymim.data.photo_files import photo_paths
from tinymim.data.pixels import photo_size
from tinymim.errors import DataError
from tinymim.schema import Limits, check, read_large_json

LARGEST = 256 << 20  # bytes of a file; it may hold its photo, too
CIRCLE = 64  # corners
Pixel = Annotated[float, Limits(-65535, 65535)]
IGNORED_NAMES = ("__ignore__", "_background_")  # of labelme's own converters


class Drawn(TypedDict):
    """A shape."""

    label: str
    points: list[tuple[Pixel, Pixel]]
    shape_type: NotRequired[str | None]


class File(TypedDict):
    """A file; what else it holds is not used."""

    shapes: list[Drawn]
    imageHeight: NotRequired[int | None]
    imageWidth: NotRequired[int | None]


def is_labelme(folder: Path) -> bool:
    """Whether the first JSON file beside photos is of LabelMe."""
    for path in sorted(map(Path, photo_paths(folder, (".json",))))[:3]:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if '"shapes"' in (head := file.read(1 << 16)) and ('"version"' in head or '"flags"' in head):
                return True
    return False


@register_format("labelme", "a .json of polygons beside each photo", is_labelme)
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read every JSON file; classes are the labels, by name; photos without a file are not labelled and left out."""
    need_folder(source, "the photos and their .json files")
    photos = photos_by_stem(source)
    files = {
        path.relative_to(source).with_suffix("").as_posix(): path for path in map(Path, photo_paths(source, (".json",)))
    }
    found = {stem: _shapes(files[stem], photo) for stem, photo in photos.items() if stem in files}
    if not found:
        raise DataError(
            f"no labels of LabelMe in {source}",
            "no photo in it has a .json file of its name",
            "put both into one folder",
        )
    names = sorted({name for shapes in found.values() for name, _ in shapes} - {*IGNORED_NAMES})
    classes, fill, ids = class_ids(names, source, ignore_unlabelled)
    ids |= {"__ignore__": 255, "_background_": fill}
    samples = [
        Sample(
            photos[stem],
            stem,
            None,
            functools.partial(_ids, photos[stem], fill, [(ids[n], s) for n, s in shapes], files[stem]),
        )
        for stem, shapes in found.items()
        if shapes or not ignore_unlabelled
    ]
    notes = ["where shapes overlap, the smaller one is on top"]
    left = {
        "photos have no .json file": len(photos) - len(found),
        ".json files have no photo": len({*files} - {*photos}),
        "photos have no shape": len(found) - len(samples),
    }
    notes += [f"{count} {why} and are left out" for why, count in left.items() if count]
    return Source(samples, classes, None, notes)


def _ids(photo: Path, fill: int, shapes: list[tuple[int, list[list[float]]]], file: Path) -> np.ndarray:
    return paint(photo_size(photo)[::-1], fill, shapes, str(file))


def _shapes(file: Path, photo: Path) -> list[tuple[str, list[list[float]]]]:
    """(label, polygons) of each shape."""
    about = read_large_json(file, LARGEST, fix=FIX)
    if isinstance(about, dict):
        about.pop("imageData", None)  # the photo as text
    check(about, File, str(file), fix=FIX)
    size, told = photo_size(photo), (about.get("imageWidth"), about.get("imageHeight"))
    if None not in told and told != size:
        raise DataError(
            f"{file} was drawn on a photo of {told[0]} x {told[1]} pixels",
            f"{photo.name} has {size[0]} x {size[1]}, upright",
            "put back the photo that it was drawn on",
        )
    return [(shape["label"], [_polygon(shape, file)]) for shape in about["shapes"]]


def _polygon(shape: Drawn, file: Path) -> list[float]:
    points, kind = shape["points"], shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (a, b), (c, d) = points
        points = [(a, b), (c, b), (c, d), (a, d)]
    elif kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius, turn = math.dist((x, y), edge), 2 * math.pi / CIRCLE
        points = [(x + radius * math.cos(i * turn), y + radius * math.sin(i * turn)) for i in range(CIRCLE)]
    elif kind not in ("polygon", "rectangle") or len(points) < 3:
        raise DataError(
            f"a shape {shape['label']!r} of {file}",
            f"a {kind} of {len(points)} points has no area",
            "draw polygons, rectangles or circles, or remove it",
        )
    return [value for point in points for value in point]
