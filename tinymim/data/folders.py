"""Labelled photo folders in ADE20K layout: which label belongs to which photo, and what the label ids mean.

``images/{training,validation}/NAME.jpg`` beside ``annotations/{training,validation}/NAME.png`` (8- or 16-bit ids, or
RGB in the colours of dataset.json). What the ids mean comes from ``dataset.json`` {classes, palette, ignore: [ids],
zero_is_ignored, ignore_palette}; without it from the options ``--ignore-label`` / ``--reduce-zero-label``; without
those from ADE20K's own file names or a scan of all labels; the result is printed. 255 is always ignored. NumPy and
Pillow only.
"""

import colorsys
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinymim.data.dataset_json import LARGEST_ID, MOST_CLASSES, Palette, read_meaning
from tinymim.data.label_files import (
    IGNORED,
    RARE,
    ColourIds,
    Pair,
    check_sizes,
    count_ids,
    find_pairs,
    made_up_ids,
    ranges,
    read_ids,
    spread,
    unique_ids,
)
from tinymim.data.photo_files import IMAGES, LABELS, subfolders, tell
from tinymim.errors import DataError

__all__ = ["IGNORED", "SPLITS", "Layout", "Pair", "read_layout"]
SPLITS = {"train": "training", "val": "validation"}  # of a layout, and their folders


@dataclass(frozen=True)
class Layout:
    """A labelled folder: (photo, label) pairs and the meaning of the ids.

    Attributes:
        source: Where the meaning was read: "dataset.json", "options", "ade20k" (file names) or "scan".
        colour_ids: Ids of label files that hold colours, by the palette of dataset.json.
    """

    root: Path
    train: list[Pair]
    val: list[Pair]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: tuple[int, ...]
    zero_is_ignored: bool
    source: str
    colour_ids: ColourIds = ()

    def __str__(self) -> str:
        words = "0 ignored, the rest shifted down by one, " if self.zero_is_ignored else ""
        ignored = ", ".join(map(str, sorted({*self.ignore, IGNORED})))
        return (
            f"{self.root}: {len(self.train)} training and {len(self.val)} validation pairs, "
            f"{len(self.classes)} classes ({words}ignored ids: {ignored}; read from {_SOURCES[self.source]})"
        )

    def need(self, split: str) -> list[Pair]:
        """Pairs of "train" or "val", their sizes checked.

        Raises:
            DataError: there are none, a label is not of its photo's size, or no pixel of the split counts.
        """
        pairs: list[Pair] = getattr(self, split)
        folder = self.root / IMAGES / SPLITS[split]
        if not pairs:
            raise DataError(
                f"no photos in {folder}",
                "the folder is missing or empty",
                f"put photos there and their labels of the same name under {LABELS}/",
            )
        check_sizes(pairs, training=split == "train")
        if not any(self.counted(label) for _, label in pairs):
            raise DataError(
                f"no pixel of the labels of {folder} counts",
                f"all {len(pairs)} labels hold ignored ids only ({_some(self.ignored)})",
                f'correct the labels, or "ignore" in {self.root / "dataset.json"} (without it: --ignore-label)',
            )
        return pairs

    def counted(self, label: Path) -> frozenset[int]:
        """Ids of a label file that are not ignored."""
        return unique_ids(label, self.colour_ids) - self.ignored

    def count(self, label: Path) -> dict[int, int]:
        """Pixels of a label file by training id; those that are ignored are not counted."""
        found = count_ids(label, self.colour_ids)
        return {i - self.zero_is_ignored: pixels for i, pixels in found.items() if i not in self.ignored}

    def name(self, split: str, photo: Path) -> str:
        """A photo below its split's folder, without suffix: "0001" or "seq05/0001"."""
        return photo.relative_to(self.root / IMAGES / SPLITS[split]).with_suffix("").as_posix()

    def match(self, name: str, classes: Sequence[str]) -> tuple[np.ndarray | None, str | None]:
        """Match a segmentor's classes with the folder's: by name where both have names, else by number.

        Args:
            name: The segmentor, for the error.
            classes: Its class names, "class 0", "class 1", ... where it has none.

        Returns:
            uint8 (256,): segmentor's id -> folder's id, or None where they are the same; and a remark, or None.

        Raises:
            DataError: another number of classes, or other names.
        """
        if len(classes) != len(self.classes):
            raise DataError(
                f"{name} knows {len(classes)} classes, {self.root} has {len(self.classes)}",
                "the segmentor was trained on other data",
                "give the folder it was trained for; name ids that are not classes in dataset.json or by "
                "--ignore-label",
            )
        theirs, ours = ([" ".join(c.casefold().split()) for c in names] for names in (classes, self.classes))
        if theirs == ours:
            return None, None
        if _are_numbers(theirs) or _are_numbers(ours):
            return None, "only one of segmentor and folder names its classes; they were matched by number"
        if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
            at = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
            raise DataError(
                f"{name} has other classes than {self.root}",
                f"its class {at} is {classes[at]!r}, the folder's {self.classes[at]!r}",
                "give the folder it was trained for; where only the spelling differs, use its names in dataset.json",
            )
        table = np.arange(256, dtype=np.uint8)
        table[: len(ours)] = [ours.index(c) for c in theirs]
        return table, "its classes are in another order than the folder's; they were matched by name"

    def check_ids(self, label: Path) -> None:
        """Refuse a label file with ids that are neither classes nor ignored.

        Raises:
            DataError: it holds one, or cannot be read.
        """
        table = self.id_table()
        if wrong := [i for i in unique_ids(label, self.colour_ids) if not 0 <= i < len(table) or table[i] < 0]:
            raise self._wrong_id(label, max(wrong))

    def read_label(self, path: str | Path) -> np.ndarray:
        """Label file as uint8 (H, W): training ids 0 .. classes - 1, and 255 where ignored.

        Raises:
            DataError: unreadable, not single-channel, or an undefined id.
        """
        raw, table = read_ids(Path(path), self.colour_ids), self.id_table()
        last = len(table) - 1
        ids = table[raw if raw.dtype == np.uint8 else np.where((raw < 0) | (raw > last), last, raw)]
        if (ids < 0).any():
            raise self._wrong_id(Path(path), int(raw[ids < 0].max()))
        return ids.astype(np.uint8)

    def id_table(self) -> np.ndarray:
        """int16 (257 or more,): file id -> training id, 255 for ignored ids, -1 for undefined ids (last: too large)."""
        table = np.full(max(self.ignored) + 2, -1, np.int16)
        first = 1 if self.zero_is_ignored else 0
        table[first : first + len(self.classes)] = np.arange(len(self.classes))
        table[[*self.ignored]] = IGNORED
        return table

    @property
    def ignored(self) -> frozenset[int]:
        """Ids of label files that do not count."""
        return frozenset({*self.ignore, IGNORED, *([0] if self.zero_is_ignored else [])})

    def _wrong_id(self, path: Path, value: int) -> DataError:
        last = len(self.classes) - (0 if self.zero_is_ignored else 1)
        return DataError(
            f"{path} holds the label id {value}",
            f"with {len(self.classes)} classes the ids go up to {last}"
            + (" (0 is ignored)" if self.zero_is_ignored else ""),
            f'correct the file, or name the id in {self.root / "dataset.json"} under "classes" or "ignore" '
            f"(without dataset.json: --ignore-label {value})",
        )


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
        inside = [name for name in subfolders(root) if (root / name / IMAGES).is_dir()] if root.is_dir() else []
        hint = f"; {root / inside[0]} has that layout" if inside else ""
        raise DataError(
            f"{root} is not a labelled folder" if root.is_dir() else f"there is no folder {root}",
            f"it must hold images/{{training,validation}} and annotations/{{training,validation}}{hint}",
            f"tinymim data {shlex.quote(str(root))} tells how it becomes one"
            if root.is_dir() and not inside
            else "give the folder that holds images/ and annotations/ (README: Your labelled photos)",
        )
    pairs = {split: find_pairs(root / IMAGES / folder, root / LABELS / folder) for split, folder in SPLITS.items()}
    train, val = pairs["train"], pairs["val"]
    if not train and not val:
        raise DataError(
            f"no photos under {root / 'images'}",
            "images/training and images/validation are missing or empty",
            "put photos there and their labels of the same name under annotations/",
        )
    layout = give_meaning(root, train, val, ignore_label=ignore_label, reduce_zero_label=reduce_zero_label)
    check_labels(layout)
    return layout


def give_meaning(
    root: Path,
    train: list[Pair],
    val: list[Pair],
    *,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
) -> Layout:
    """What the ids of a folder's pairs mean; the labels are not checked, see :func:`check_labels`.

    Raises:
        DataError: a bad ``dataset.json``, options that contradict it, or, without it, ids that cannot be counted.
    """
    extra = _ignored_ids(ignore_label)
    palette: Palette | None = None
    colour_ids: ColourIds = ()
    if (root / "dataset.json").is_file():
        source = "dataset.json"
        meaning = read_meaning(root / "dataset.json")
        (classes, palette, ignore, zero, _), colour_ids = meaning, meaning.colour_ids
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
        classes = _count_classes(root, [*train, *val], ignore, zero)
    return Layout(root, train, val, classes, palette or colours(len(classes)), ignore, zero, source, colour_ids)


def _ignored_ids(ignore_label: int | Sequence[int] | None) -> tuple[int, ...]:
    """``--ignore-label`` as ids.

    Raises:
        DataError: one is no id that a label file can hold.
    """
    ids = () if ignore_label is None else (ignore_label,) if isinstance(ignore_label, int) else tuple(ignore_label)
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= LARGEST_ID]:
        raise DataError(
            f"--ignore-label {wrong[0]} is no label id",
            f"it names ids in the label files, which go from 0 to {LARGEST_ID}; {IGNORED} is always ignored",
            "leave it out, or give the id that the files hold where no class is",
        )
    return ids


def _count_classes(root: Path, pairs: Sequence[Pair], ignore: Sequence[int], zero: bool) -> tuple[str, ...]:
    """Names for the ids that a scan of all labels finds: "class 0", ...; ids that are not found are told, and kept.

    Raises:
        DataError: no id or a single one is left, or ids are too large, or made up by JPEG or a resize.
    """
    ids = frozenset().union(*(unique_ids(label) for _, label in pairs))
    ignored = frozenset({*ignore, IGNORED, *([0] if zero else [])})
    found = ids - ignored
    made_up, rare = made_up_ids(pairs, ignored)
    if made_up:
        raise DataError(
            f"the labels of {root} look as if JPEG or a resize had changed them",
            f"the ids {_some(made_up)} occur only as thin lines and specks between others",
            "save the labels as PNG, resize them by nearest neighbour only; if these are classes, name them in a "
            "dataset.json",
        )
    if not found or not 0 <= min(found) <= max(found) <= MOST_CLASSES:
        large = [i for i in found if not 0 <= i <= MOST_CLASSES]
        raise DataError(
            f"the labels of {root} cannot be counted",
            f"classes are ids from 0 to {MOST_CLASSES}, and they hold {_some(large)}"
            if found
            else "every pixel is ignored",
            f"name what is no class: --ignore-label {_some(large, ' ')}; or add a dataset.json"
            if found
            else "save single-channel labels with an id for each class, or add a dataset.json",
        )
    if len(found) == 1:
        if found == {0} and IGNORED in ids:
            raise _binary(root)
        raise DataError(
            f"the labels of {root} hold one class",
            f"every pixel is {_some(found)}, or ignored ({_some(ignored)}): there is nothing to learn",
            "label the background as a class, too; or name classes that this folder lacks in a dataset.json",
        )
    if rare:
        tell(
            f"{root}: the ids {ranges(rare)} fill less than {RARE:.2%} of the pixels each; if JPEG or a resize made "
            "them up, save the labels again (a dataset.json would say which ids are classes)"
        )
    first = 1 if zero else 0
    if gaps := {*range(first, max(found))} - found:
        tell(
            f"{root}: no label holds the ids {ranges(gaps)}; they are kept as classes without pixels "
            "(a dataset.json would name the classes)"
        )
    return tuple(f"class {i}" for i in range(max(found) + 1 - first))


def _some(numbers: Iterable[int], between: str = ", ") -> str:
    """The first numbers as text."""
    return between.join(map(str, sorted(numbers)[:8])) + (" ..." if len([*numbers]) > 8 else "")


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether class names are those of a folder without names."""
    return all(name == f"class {i}" for i, name in enumerate(names))


def _is_ade20k(root: Path, pairs: list[Pair]) -> bool:
    """Recognise ADE20K by its file names, ``ADE_train_00000001.jpg``, or its table of classes next to the folders."""
    named = all(re.fullmatch(r"ADE_(train|val)_\d{8}", photo.stem) for photo, _ in pairs)
    return named or any((root / f"objectInfo150.{kind}").is_file() for kind in ("txt", "csv"))


def check_labels(layout: Layout) -> None:
    """Look at labels of each split, evenly spread: ids without a class, and splits that hold a single class.

    Raises:
        DataError: an id without class, or the labels are masks of 0 and 255, whose foreground would be ignored.
    """
    counted, ids = dict[str, frozenset[int]](), set[int]()
    for split, folder in SPLITS.items():
        pairs = getattr(layout, split)
        for _, label in spread(pairs):
            layout.check_ids(label)
            ids |= unique_ids(label, layout.colour_ids)
        if pairs:
            counted[folder] = frozenset().union(*(layout.counted(label) for _, label in spread(pairs)))
    if ids == {0, IGNORED} and all(
        unique_ids(label, layout.colour_ids) <= ids for _, label in [*layout.train, *layout.val]
    ):
        raise _binary(layout.root)
    for folder, classes in counted.items():
        if len(classes) == 1:
            name = layout.classes[next(iter(classes)) - layout.zero_is_ignored]
            tell(
                f"{layout.root}: the labels of {folder} hold one class only, {name!r} ({_some(layout.ignored)} ignored)"
            )


def _binary(root: Path) -> DataError:
    convert = (
        "import sys, numpy as np; from PIL import Image; "
        "[Image.fromarray((np.asarray(Image.open(p)) > 127).astype('uint8')).save(p) for p in sys.argv[1:]]"
    )
    return DataError(
        f"the labels of {root} are masks of 0 and 255",
        "255 is always ignored: the foreground would not count, and one class would be left",
        f'save it as id 1, e.g. in a copy: python -c "{convert}" {shlex.quote(str(root / LABELS))}/*/*.png',
    )


def colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours: hues by the golden ratio, two brightnesses."""
    made = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.95 - 0.35 * (i % 2)) for i in range(count)]
    return tuple((int(r * 255), int(g * 255), int(b * 255)) for r, g, b in made)
