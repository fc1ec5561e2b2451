"""What a format gives: photos, how the ids of each are made, and what they mean."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymim.data.dataset_json import MOST_CLASSES
from tinymim.data.label_files import IGNORED
from tinymim.data.photo_files import photo_paths
from tinymim.errors import ConfigError, DataError, TinyMIMError

BACKGROUND = "background"
LARGEST = 8 << 20  # bytes of a text file
Shape = Any  # polygons [[x, y, x, y, ...], ...] in pixels, or COCO's run lengths {"size": [H, W], "counts": ...}
FIX = "correct it, or export it again with the tool that made it"


@dataclass(frozen=True)
class Sample:
    """A photo with its labels.

    Attributes:
        photo: The file.
        name: Below ``images/SPLIT``, without suffix: "0001" or "seq05/0001".
        split: "train" or "val"; None: the format does not say.
        ids: Makes its ids, uint8 (H, W), 255 ignored; called when it is written.
    """

    photo: Path
    name: str
    split: str | None
    ids: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Source:
    """What a reader found.

    Attributes:
        samples: Photos.
        classes: Names, in the order of the ids.
        palette: RGB of each; None: made up.
        notes: What was left out, or read in one of several ways.
    """

    samples: list[Sample]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None
    notes: list[str] = field(default_factory=list)


class Reader(NamedTuple):
    """A format.

    Attributes:
        read: (source, ignore_unlabelled) -> what is in it; the second: pixels of no object are ignored, else they are
            a class, "background".
        known_by: Whether a folder looks like it; None: it cannot be told from others.
        about: In a few words, for ``--help`` and errors.
    """

    read: Callable[[Path, bool], Source]
    known_by: Callable[[Path], bool] | None
    about: str


FORMATS: dict[str, Reader] = {}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def register_format(
    name: str, about: str, known_by: Callable[[Path], bool] | None = None
) -> Callable[[Callable[[Path, bool], Source]], Callable[[Path, bool], Source]]:
    """Make a function the reader of a format; see :class:`Reader`."""

    def register(read: Callable[[Path, bool], Source]) -> Callable[[Path, bool], Source]:
        FORMATS[name] = Reader(read, known_by, about)
        return read

    return register


def split_of(word: str) -> str | None:
    """The split that a folder's or file's name tells: "train2017" -> "train"; the photos of "test" are in none.

    Returns:
        "train", "val", "test" or None.
    """
    words = re.split(r"[^a-z]+", word.casefold())
    return next((split for word in words if (split := _SPLITS.get(word))), None)


def class_ids(
    names: Sequence[str], where: Path, ignore_unlabelled: bool
) -> tuple[tuple[str, ...], int, dict[str, int]]:
    """Classes of a format of objects: "background" comes first unless the pixels of no object are ignored.

    Returns:
        Classes, what fills a label before objects are painted, and the id of each of ``names``.

    Raises:
        DataError: no names, one twice, or too many.
    """
    twice = next((name for name in names if [*names].count(name) > 1), None)
    if not names or twice is not None or not all(name.strip() and name.isprintable() for name in names):
        why = "it names none" if not names else f"{twice!r} is there twice" if twice else "each needs a name to print"
        raise DataError(f"the classes of {where}", why, FIX)
    plain = next((name for name in names if name.casefold() == BACKGROUND), None)
    rest = [name for name in names if ignore_unlabelled or name != plain]
    classes = (*rest,) if ignore_unlabelled else (plain or BACKGROUND, *rest)
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise DataError(
            f"{where} has {len(classes)} class(es)",
            f"a segmentor knows 2 to {MOST_CLASSES}",
            "leave --unlabelled ignore out: pixels of no object are then a class"
            if len(classes) < 2
            else "leave out rare classes",
        )
    return classes, IGNORED if ignore_unlabelled else 0, {name: i for i, name in enumerate(classes)}


def paint(size: tuple[int, int], fill: int, objects: Sequence[tuple[int, Shape]], where: str) -> np.ndarray:
    """Ids of a photo from its objects, the largest first: where they overlap, the smaller one is on top.

    Polygons are filled as COCO does (pycocotools): a pixel belongs to one if its centre does, as near as a fifth of a
    pixel. All polygons of one object are one area.

    Args:
        size: Height and width in pixels.
        fill: Of pixels of no object.
        objects: (id, shape).
        where: File and photo, for the error.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: run lengths of another size, or damaged ones; a polygon of fewer than three points, or far outside.
        TinyMIMError: pycocotools is not installed.
    """
    masks = sorted(((decode(shape, size, where), i) for i, shape in objects), key=lambda each: -int(each[0].sum()))
    ids_HW = np.full(size, fill, np.uint8)
    for mask_HW, i in masks:
        ids_HW[mask_HW] = i
    return ids_HW


def decode(shape: Shape, size: tuple[int, int], where: str) -> np.ndarray:
    """An object's pixels, bool (H, W); see :func:`paint`."""
    coco, pixels = _pycocotools(), size[0] * size[1]
    if isinstance(shape, dict):
        counts = shape.get("counts")
        if [*(shape.get("size") or ())] != [*size]:
            raise DataError(f"an object of {where}", f"its run lengths are of the size {shape.get('size')}", FIX)
        if isinstance(counts, list):
            whole = all(type(n) is int and 0 <= n <= pixels for n in counts) and sum(counts) == pixels
        else:
            whole = isinstance(counts, str) and counts != ""
        if not whole:
            raise DataError(f"an object of {where}", f"its run lengths do not fill {size[1]} x {size[0]} pixels", FIX)
        try:
            packed = coco.frPyObjects(shape, *size) if isinstance(counts, list) else shape
            mask_HW = coco.decode(packed)
        except (ValueError, TypeError, UnicodeEncodeError) as error:
            raise DataError(f"an object of {where}", f"its run lengths are damaged ({error})", FIX) from None
        if mask_HW.max(initial=0) > 1:
            raise DataError(f"an object of {where}", "its run lengths are damaged", FIX)
        return mask_HW.astype(bool)
    polygons = [np.asarray(polygon, np.float64).ravel() for polygon in shape]
    if any(len(p) < 6 or len(p) % 2 or not np.isfinite(p).all() or abs(p).max() >= 1 << 16 for p in polygons):
        raise DataError(f"an object of {where}", "a polygon is no list of three points or more of x, y in pixels", FIX)
    return coco.decode(coco.merge(coco.frPyObjects([p.tolist() for p in polygons], *size))).astype(bool)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise TinyMIMError(
            "objects are painted by pycocotools", "it is not installed", 'pip install pycocotools, or ".[data]"'
        ) from None
    return mask


def photos_by_stem(folder: Path) -> dict[str, Path]:
    """Photos below a folder by their path in it without suffix.

    Raises:
        DataError: two have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(map(Path, photo_paths(folder, labels=True))):
        if (other := found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)) != path:
            raise DataError(
                f"two photos have one name: {other} and {path.name}",
                "their labels could not be told apart",
                "rename or remove one of them",
            )
    return found


def text_of(file: Path) -> str:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
        DataError: it cannot be read, has another encoding, or more than 8 MiB.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it has {file.stat().st_size} bytes, at most {LARGEST} are expected")
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot use {file}", str(error), FIX) from None


def need_folder(source: Path, example: str) -> None:
    """Refuse a source that is no folder.

    Raises:
        ConfigError: it is none.
    """
    if not source.is_dir():
        raise ConfigError(
            f"no folder at {source}", "the data are read from a folder", f"give the one that holds {example}"
        )
