"""YOLO's segmentation labels: ``images/.../NAME.jpg``, ``labels/.../NAME.txt`` of lines "class x y x y ...", data.yaml.

Coordinates are shares of width and height. A few lines of our own: supervision's reader holds the masks of all objects
of all photos at once, and brings PyAV, matplotlib and requests along.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.formats.base import (
    FIX,
    Sample,
    Source,
    class_ids,
    paint,
    photos_by_stem,
    register_format,
    split_of,
    text_of,
)
from tinymim.data.photo_files import tell
from tinymim.data.pixels import photo_size
from tinymim.errors import DataError


def is_yolo(folder: Path) -> bool:
    """Whether a folder has ``data.yaml`` beside folders of labels."""
    return _yaml(folder) is not None and any(folder.glob("**/labels"))


@register_format("yolo-seg", "data.yaml, images/ and labels/ of polygons in .txt files", is_yolo)
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read the labels of every photo; a photo without a .txt file holds no object, as YOLO has it."""
    file = source if source.is_file() else _yaml(source)
    if file is None:
        raise DataError(
            f"no data.yaml in {source}",
            "it names the classes",
            'write one: "names: [road, car]", beside images/ and labels/',
        )
    names = _names(file)
    classes, fill, number = class_ids(names, file, ignore_unlabelled)
    ids = [number[name] for name in names]
    samples, without, tests = [], 0, 0
    for stem, photo in photos_by_stem(file.parent).items():
        parts = stem.split("/")
        if "images" not in parts[:-1]:
            continue
        at = parts.index("images")
        where = [*parts[:at], *parts[at + 1 : -1]]
        split = next((s for part in where if (s := split_of(part))), None)
        if split == "test":
            tests += 1
            continue
        label = file.parent.joinpath(*parts[:at], "labels", *parts[at + 1 :]).with_name(parts[-1] + ".txt")
        objects = _objects(label, ids) if label.is_file() else []
        if not objects:
            without += 1
            if ignore_unlabelled:
                continue
        kept = [part for part in where if split_of(part) is None]
        samples.append(
            Sample(photo, "/".join([*kept, parts[-1]]), split, functools.partial(_ids, photo, fill, objects, label))
        )
    if not samples:
        raise DataError(
            f"no photos for {file}",
            "there are none in folders called images beside it",
            "put them there, and labels/ beside",
        )
    if without == len(samples):
        raise DataError(
            f"no labels for {file}",
            f"none of {without} photos has an object in a .txt file below labels/",
            "check the folder",
        )
    if tests:
        tell(f"{tests} photos of {source} are in a folder called test and are left out")
    notes = ["where objects overlap, the smaller one is on top"]
    left = "left out" if ignore_unlabelled else "background all over"
    notes += [f"{without} photos have no object and are {left}"] * bool(without)
    return Source(samples, classes, None, notes)


def _ids(photo: Path, fill: int, objects: list[tuple[int, np.ndarray]], label: Path) -> np.ndarray:
    width, height = photo_size(photo)
    shapes = [(i, [(shares * (width, height)).ravel()]) for i, shares in objects]
    return paint((height, width), fill, shapes, str(label))


def _yaml(folder: Path) -> Path | None:
    found = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    return min(found, key=lambda path: (path.stem != "data", path.name), default=None)


def _names(file: Path) -> list[str]:
    """Names of the classes, by their numbers."""
    import yaml

    try:
        found: Any = yaml.safe_load(text_of(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"cannot use {file}", f"it is no YAML ({error})", FIX) from None
    names = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, dict) and all(type(key) is int for key in names):
        names = [names[key] for key in sorted(names)] if sorted(names) == [*range(len(names))] else None
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"cannot use {file}", 'it has no "names": a list, or numbers from 0 with a name each', FIX)
    return [str(name) for name in names]


def _objects(label: Path, ids: list[int]) -> list[tuple[int, np.ndarray]]:
    """(id, points (N, 2) as shares of width and height) of a .txt file."""
    found = []
    for i, line in enumerate(text_of(label).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) in (5, 6):
            raise DataError(
                f"line {i} of {label} is a box",
                "a box does not say which of its pixels are the object",
                "export polygons (YOLO segmentation): a class and three points or more",
            )
        try:
            number, points = float(words[0]), np.array(words[1:], np.float64)
            if number not in range(len(ids)):
                raise ValueError(f"its class is {words[0]}, and data.yaml names {len(ids)}")
            if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
                raise ValueError("it is no class and three points or more")
            if abs(points).max() > 2:
                raise ValueError(
                    f"it has the coordinate {points[abs(points).argmax()]:g}, and they are shares of the sides"
                )
        except ValueError as error:
            raise DataError(f"line {i} of {label}", str(error), FIX) from None
        found.append((ids[int(number)], points.reshape(-1, 2)))
    return found
