"""Labelled photo folders in ADE20K layout: which label belongs to which photo, and what the label ids mean.

``images/{training,validation}/NAME.jpg`` beside ``annotations/{training,validation}/NAME.png`` (8-bit ids). What the
ids mean comes from ``dataset.json`` {classes, palette, ignore: [ids], zero_is_ignored}; without it from the options
``--ignore-label`` / ``--reduce-zero-label``; without those from ADE20K's own file names or a scan of all labels; the
result is printed. 255 is always ignored. NumPy and Pillow only.
"""

import colorsys
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinymim.errors import DataError

IGNORED = 255
PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
CHECKED_LABELS = 400  # labels checked before work starts; every label is checked again when it is read
Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Layout:
    """A labelled folder: (photo, label) pairs and the meaning of the ids.

    Attributes:
        source: Where the meaning was read: "dataset.json", "options", "ade20k" (file names) or "scan".
    """

    root: Path
    train: list[Pair]
    val: list[Pair]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: tuple[int, ...]
    zero_is_ignored: bool
    source: str

    def __str__(self) -> str:
        words = "0 ignored, the rest shifted down by one, " if self.zero_is_ignored else ""
        ignored = ", ".join(map(str, sorted({*self.ignore, IGNORED})))
        return (
            f"{self.root}: {len(self.train)} training and {len(self.val)} validation pairs, "
            f"{len(self.classes)} classes ({words}ignored ids: {ignored}; read from {_SOURCES[self.source]})"
        )

    def need(self, split: str) -> list[Pair]:
        """Pairs of "train" or "val".

        Raises:
            DataError: there are none.
        """
        pairs: list[Pair] = getattr(self, split)
        if not pairs:
            folder = self.root / "images" / _SPLITS[split]
            raise DataError(
                f"no photos in {folder}",
                "the folder is missing or empty",
                "put photos there and their labels of the same name under annotations/",
            )
        return pairs

    def read_label(self, path: str | Path) -> np.ndarray:
        """Label file as uint8 (H, W): training ids 0 .. classes - 1, and 255 where ignored.

        Raises:
            DataError: unreadable, not single-channel, or an undefined id.
        """
        raw = _read_ids(Path(path))
        table = self.id_table()
        ids = table[np.minimum(raw, 256)]
        if (ids < 0).any():
            raise self._wrong_id(Path(path), int(raw[ids < 0].max()))
        return ids.astype(np.uint8)

    def id_table(self) -> np.ndarray:
        """int16 (257,): file id -> training id, 255 for ignored ids, -1 for undefined ids (256: too large)."""
        table = np.full(257, -1, np.int16)
        first = 1 if self.zero_is_ignored else 0
        table[first : first + len(self.classes)] = np.arange(len(self.classes))
        table[[*self.ignore, IGNORED, *([0] if self.zero_is_ignored else [])]] = IGNORED
        return table

    def _wrong_id(self, path: Path, value: int) -> DataError:
        last = len(self.classes) - (0 if self.zero_is_ignored else 1)
        return DataError(
            f"{path} holds the label id {value}",
            f"with {len(self.classes)} classes the ids go up to {last}"
            + (" (0 is ignored)" if self.zero_is_ignored else ""),
            f'correct the file, or name the id in {self.root / "dataset.json"} under "classes" or "ignore" '
            f"(without dataset.json: --ignore-label {value})",
        )


_SPLITS = {"train": "training", "val": "validation"}
_SOURCES = {
    "dataset.json": "dataset.json",
    "options": "the options, classes counted in the labels",
    "ade20k": "ADE20K's file names",
    "scan": "a scan of all labels; a dataset.json would name the classes",
}


def read_layout(
    root: str | Path, *, ignore_label: int | Sequence[int] | None = None, reduce_zero_label: bool | None = None
) -> Layout:
    """Read a labelled folder; see the top of this file for the rules.

    Args:
        root: Folder with ``images/`` and ``annotations/``.
        ignore_label: Id or ids to ignore besides 255.
        reduce_zero_label: Whether id 0 is "no class" and the classes start at 1.

    Raises:
        DataError: missing or empty folders, photos without label, a bad ``dataset.json``, options that contradict it,
            or undefined ids.
    """
    root = Path(root)
    if not (root / "images").is_dir():
        inside = [p.name for p in sorted(root.iterdir()) if (p / "images").is_dir()] if root.is_dir() else []
        hint = f"; {root / inside[0]} has that layout" if inside else ""
        raise DataError(
            f"{root} is not a labelled folder" if root.is_dir() else f"there is no folder {root}",
            f"it must hold images/{{training,validation}} and annotations/{{training,validation}}{hint}",
            "give the folder that holds images/ and annotations/ (README: Your labelled photos)",
        )
    pairs = {split: _pairs(root, folder) for split, folder in _SPLITS.items()}
    train, val = pairs["train"], pairs["val"]
    if not train and not val:
        raise DataError(
            f"no photos under {root / 'images'}",
            "images/training and images/validation are missing or empty",
            "put photos there and their labels of the same name under annotations/",
        )
    extra = () if ignore_label is None else (ignore_label,) if isinstance(ignore_label, int) else tuple(ignore_label)
    palette: tuple[tuple[int, int, int], ...] | None = None
    if (root / "dataset.json").is_file():
        source = "dataset.json"
        classes, palette, ignore, zero = _read_meaning(root / "dataset.json")
        if (extra and not set(extra) <= {*ignore, IGNORED}) or reduce_zero_label not in (None, zero):
            raise DataError(
                "the options contradict dataset.json",
                f"{root / 'dataset.json'} says ignore={list(ignore)}, zero_is_ignored={str(zero).lower()}",
                "leave --ignore-label and --reduce-zero-label out, or change the file",
            )
    elif _is_ade20k(root, [*train, *val]) and reduce_zero_label in (None, True):
        from tinymim.data.ade20k import CLASSES, PALETTE

        source, classes, palette, ignore, zero = "ade20k", CLASSES, PALETTE, extra, True
    else:
        source = "scan" if ignore_label is None and reduce_zero_label is None else "options"
        zero, ignore = bool(reduce_zero_label), extra
        found = set[int]().union(*(_ids(label) for _, label in [*train, *val])) - {*ignore, IGNORED}
        if zero:
            found.discard(0)
        if not found or max(found) > 254:
            raise DataError(
                f"the labels of {root} cannot be counted",
                f"largest id {max(found)}, ids fit 0 to 254" if found else "every pixel is ignored",
                "save single-channel 8-bit labels, or add a dataset.json",
            )
        classes = tuple(f"class {i}" for i in range(max(found) + (0 if zero else 1)))
    layout = Layout(root, train, val, classes, palette or _colours(len(classes)), ignore, zero, source)
    _check_labels(layout)
    return layout


def _pairs(root: Path, folder: str) -> list[Pair]:
    """Photos of one split with their labels, sorted by name."""
    images, labels = root / "images" / folder, root / "annotations" / folder
    photos = sorted(p for p in images.rglob("*") if p.suffix.lower() in PHOTOS and not p.name.startswith("."))
    pairs = [(photo, (labels / photo.relative_to(images)).with_suffix(".png")) for photo in photos]
    have = set(labels.rglob("*.png")) if pairs else set()
    without = [photo for photo, label in pairs if label not in have]
    if without:
        raise DataError(
            f"{len(without)} of {len(photos)} photos in {images} have no label, the first is {without[0].name}",
            f"{labels / without[0].relative_to(images).with_suffix('.png')} does not exist",
            "add the label (same name, .png) or remove the photo",
        )
    return pairs


def _read_meaning(
    path: Path,
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None, tuple[int, ...], bool]:
    """Classes, palette, ignored ids and zero_is_ignored of a ``dataset.json``."""

    def wrong(why: str) -> DataError:
        example = '{"classes": ["road", "car"], "palette": [[128, 64, 128], [64, 0, 128]], "ignore": [11]}'
        return DataError(f"cannot use {path}", why, f"write it like {example}")

    try:
        meaning: Any = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise wrong(f"it is not valid JSON ({error})") from error
    if not isinstance(meaning, dict) or not isinstance(meaning.get("classes"), list) or not meaning["classes"]:
        raise wrong('it has no list of "classes"')
    if unknown := set(meaning) - {"classes", "palette", "ignore", "zero_is_ignored", "name", "description"}:
        raise wrong(f"unknown entries: {', '.join(sorted(unknown))}")
    classes, palette = tuple(map(str, meaning["classes"])), meaning.get("palette")
    if len(classes) > 254:
        raise wrong(f"{len(classes)} classes do not fit 8-bit labels (254 at most)")
    if palette is not None and (
        not isinstance(palette, list)
        or len(palette) != len(classes)
        or not all(isinstance(c, list) and len(c) == 3 and all(_is_byte(v) for v in c) for c in palette)
    ):
        raise wrong(f'"palette" needs one [red, green, blue] of 0 to 255 for each of the {len(classes)} classes')
    ignore, zero = meaning.get("ignore", []), meaning.get("zero_is_ignored", False)
    if not isinstance(ignore, list) or not all(_is_byte(v) for v in ignore):
        raise wrong('"ignore" is a list of ids from 0 to 255')
    if not isinstance(zero, bool):
        raise wrong('"zero_is_ignored" is true or false')
    return classes, None if palette is None else tuple((c[0], c[1], c[2]) for c in palette), tuple(ignore), zero


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _is_ade20k(root: Path, pairs: list[Pair]) -> bool:
    """Recognise ADE20K by its file names, ``ADE_train_00000001.jpg``, or its table of classes next to the folders."""
    named = all(re.fullmatch(r"ADE_(train|val)_\d{8}", photo.stem) for photo, _ in pairs)
    return named or any((root / f"objectInfo150.{kind}").is_file() for kind in ("txt", "csv"))


def _read_ids(path: Path) -> np.ndarray:
    """Ids of a label file, (H, W), unsigned."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise DataError(
                    f"{path} is not a label map (its mode is {image.mode})",
                    "a label has one channel of class ids; colours cannot be read back",
                    "save it as a single-channel 8-bit PNG",
                )
            return np.asarray(image).astype(np.uint32)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the label {path}", str(error), "copy the file again") from error


@functools.lru_cache(maxsize=200_000)
def _ids_of_version(path: Path, modified: int, size: int) -> frozenset[int]:
    return frozenset(np.unique(_read_ids(path)).tolist())


def _ids(path: Path) -> frozenset[int]:
    """Ids in a label file, cached while the file does not change."""
    stat = path.stat()
    return _ids_of_version(path, stat.st_mtime_ns, stat.st_size)


def _check_labels(layout: Layout) -> None:
    """Check up to CHECKED_LABELS labels of each split, evenly spread."""
    table = layout.id_table()
    for pairs in (layout.train, layout.val):
        for _, label in pairs[:: -(-len(pairs) // CHECKED_LABELS) or 1]:
            wrong = [i for i in _ids(label) if table[min(i, 256)] < 0]
            if wrong:
                raise layout._wrong_id(label, max(wrong))


def _colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours: hues by the golden ratio, two brightnesses."""
    colours = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.95 - 0.35 * (i % 2)) for i in range(count)]
    return tuple((int(r * 255), int(g * 255), int(b * 255)) for r, g, b in colours)
