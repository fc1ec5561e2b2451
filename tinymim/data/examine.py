"""``tinymim data FOLDER``: what is in a folder, and all that training would refuse or mistake. numpy and Pillow only.

The checks are those of training (:mod:`tinymim.data.folders`, :mod:`tinymim.data.label_files`), made for every file
instead of up to the first that fails.
"""

import hashlib
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tinymim.cores import cores
from tinymim.data.dataset_json import read_meaning
from tinymim.data.flat import find_flat
from tinymim.data.folders import SPLITS, Layout, check_labels, colours, give_meaning
from tinymim.data.formats import FORMATS
from tinymim.data.label_files import IGNORED, ColourIds, Pair, check_sizes, count_ids, match_labels
from tinymim.data.photo_files import FEW_PHOTOS, IMAGES, LABELS, overheard, photo_paths
from tinymim.data.pixels import UnreadablePhoto, open_photo, photo_size
from tinymim.errors import DataError, TinyMIMError
from tinymim.progress import Progress

NO_CLASS = ("void", "unlabel", "unlabelled", "unlabeled", "ignore", "ignored", "unknown", "none", "no class")
THUMB, ALIKE, FLAT = 16, 2.0, 6.0  # side; mean difference of the same scene, and least spread of a telling one, of 255


class ClassRow(NamedTuple):
    """A class of the table: by split, its share of the pixels that count and the photos that hold it."""

    name: str
    colour: tuple[int, int, int]
    shares: dict[str, float]
    photos: dict[str, int]


@dataclass
class Findings:
    """What :func:`examine` found.

    Attributes:
        folder: The folder.
        kind: "labelled" (ADE20K layout), "flat" (photos and labels of the same names), "photos", or a format's name.
        pairs: Split -> photos with labels that can be read; the split of a flat folder is "all".
        photos: All photos.
        layout: What the ids mean; None where it cannot be known.
        classes: The table.
        ignored: Split -> share of the pixels that are ignored.
        sizes: (width, height) -> photos.
        kinds: Kind of label file -> how many.
        problems: What training refuses.
        notes: What it may mistake, or passes over.
        in_colours: Whether the labels are masks in colours that no palette names, or of 0 and 255.
    """

    folder: Path
    kind: str
    pairs: dict[str, list[Pair]]
    photos: list[Path]
    layout: Layout | None = None
    classes: list[ClassRow] = field(default_factory=list)
    ignored: dict[str, float] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[TinyMIMError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    in_colours: bool = False

    @property
    def summary(self) -> str:
        """One line: layout, pairs and what the ids mean."""
        if self.kind == "photos":
            return f"{self.folder}: {len(self.photos)} photos without labels"
        if self.kind in FORMATS:
            return f"{self.folder}: {len(self.photos)} photos, in the format {self.kind} ({FORMATS[self.kind].about})"
        if self.layout is not None and self.kind == "labelled":
            return str(self.layout)
        counts = " and ".join(f"{len(pairs)} {SPLITS.get(split, 'labelled')}" for split, pairs in self.pairs.items())
        return f"{self.folder}: {counts} photos" + (", not split" if self.kind == "flat" else "")

    def next_lines(self, options: str = "") -> list[str]:
        """Commands to paste.

        Args:
            options: How the ids were said to be read, to repeat: " --ignore-label 11".
        """
        folder = shlex.quote(str(self.folder))
        new = shlex.quote(f"{self.folder.resolve().name}-ade20k")
        if self.problems and not self.in_colours:
            return [f"tinymim data {folder}{options}"]
        if self.kind in FORMATS or self.in_colours:
            kind = "rgb-masks" if self.in_colours else self.kind
            return [f"tinymim data {folder} --from {kind} --out {new}"]
        if self.kind == "flat":
            return [f"tinymim data {folder} --split 0.2 --out {new}"]
        photos = folder if self.kind == "photos" else shlex.quote(str(self.folder / IMAGES / "training"))
        few = len(self.photos) <= FEW_PHOTOS
        recipe = "tinymim_tiny_small_data" if few else "tinymim_tiny_from_mae_base"
        lines = [f"tinymim distill --recipe {recipe} --data {photos} --out runs/student"]
        if self.kind == "labelled" and not self.pairs["val"]:
            return [f"tinymim data {folder} --split 0.2 --out {new}"]
        if self.kind == "labelled":
            config = "linear_tinymim_t_small_data" if few else "upernet_tinymim_t_light"
            student = "--student runs/student/student.pth --work-dir runs/seg"
            lines.append(f"tinymim segment {config} --data-root {folder}{options} {student}")
        return lines


def examine(
    folder: str | Path, *, ignore_label: int | Sequence[int] | None = None, reduce_zero_label: bool | None = None
) -> Findings:
    """Look at every photo and label of a folder.

    Args:
        folder: ADE20K layout; photos with labels of the same names; a format of ``--from``; or photos.
        ignore_label: See :func:`tinymim.data.folders.read_layout`.
        reduce_zero_label: See there.

    Raises:
        DataError: no such folder, or no photo in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}", "it must hold photos, and labels if there are any", "check the path")
    with overheard() as remarks:
        found = _find(folder)
        if found.pairs:
            _look_at_labels(found, ignore_label, reduce_zero_label)
        _look_at_photos(found)
    found.notes[:0] = remarks
    return found


def _find(folder: Path) -> Findings:
    """Which files are photos and labels."""
    if (folder / LABELS).is_dir() and any((folder / IMAGES / name).is_dir() for name in SPLITS.values()):
        found = Findings(folder, "labelled", {}, [])
        for split, name in SPLITS.items():
            pairs, problems = match_labels(folder / IMAGES / name, folder / LABELS / name)
            found.pairs[split] = pairs
            found.problems += problems
        found.photos = _photos(folder / IMAGES)
        if stray := len(found.photos) - len([p for name in SPLITS.values() for p in _photos(folder / IMAGES / name)]):
            found.notes.append(f"{stray} photos are in neither images/training nor images/validation and are not used")
        if not found.pairs["train"]:
            found.problems.append(
                DataError(f"no photos in {folder / IMAGES / 'training'}", "training needs some", "put photos there")
            )
    else:
        kind = next((name for name, each in FORMATS.items() if each.known_by and each.known_by(folder)), None)
        flat = None if kind else find_flat(folder)
        if kind:
            found = Findings(folder, kind, {}, [])
            try:
                source = FORMATS[kind].read(folder, False)
                found.photos = [sample.photo for sample in source.samples]
                found.notes += [f"classes: {_some(source.classes)}", *source.notes]
            except TinyMIMError as error:
                found.problems.append(error)
                found.photos = _photos(folder)
        elif not flat or not (flat.pairs or flat.problems):
            found = Findings(folder, "photos", {}, _photos(folder))
        else:
            labels = {*flat.labels}
            photos = _photos(folder / IMAGES if (folder / IMAGES).is_dir() else folder)
            both = {"all": [(pair.photo, pair.label) for pair in flat.pairs]}
            found = Findings(folder, "flat", both, [path for path in photos if path not in labels])
            found.problems += flat.problems
    if not found.photos:
        raise DataError(f"no photos in {folder}", "nothing in it is a photo", "give the folder that holds the photos")
    return found


def _photos(folder: Path) -> list[Path]:
    return sorted(map(Path, photo_paths(folder))) if folder.is_dir() else []


def _look_at_labels(found: Findings, ignore_label: int | Sequence[int] | None, reduce_zero_label: bool | None) -> None:
    """Sizes and ids of every label; then what the ids mean, and the share of each class."""
    every = [(split, pair) for split, pairs in found.pairs.items() for pair in pairs]
    about = found.folder / "dataset.json"
    try:
        colour_ids, palette = _colours(about)
    except DataError as error:
        found.problems.append(error)
        return
    progress = Progress("labels", len(every))
    good: dict[str, list[Pair]] = {split: [] for split in found.pairs}
    errors: dict[str, list[DataError]] = defaultdict(list)

    def look(pair: Pair) -> tuple[str, bool, DataError | None]:
        kind, other = "", False
        try:
            kind, other = _kind(pair[1], palette)
            count_ids(pair[1], colour_ids)
            check_sizes([pair], training=True)
        except DataError as problem:
            return kind, other, problem
        except OSError as problem:
            why = problem.strerror or str(problem)
            return kind, other, DataError(f"cannot read {pair[1]}", why, "copy the file again")
        return kind, other, None

    others = []
    with ThreadPoolExecutor(cores()) as threads:
        for i, ((split, pair), (kind, other, wrong)) in enumerate(
            zip(every, threads.map(look, [pair for _, pair in every]), strict=True), 1
        ):
            progress.update(i)
            if kind:
                found.kinds[kind] += 1
            if other:
                others.append(pair[1])
            if wrong is None:
                good[split].append(pair)
            else:
                errors[wrong.fix].append(wrong)
    progress.close()
    found.problems += [_all(same) for same in errors.values()]
    found.pairs = good
    found.in_colours = not colour_ids and any(kind.startswith("RGB") for kind in found.kinds)
    if others:
        found.notes.append(
            f"{len(others)} palette labels show other colours than dataset.json, e.g. {others[0]}: their pixels are "
            "read as ids, so check that their classes are in the same order"
        )
    _look_at_classes(found, colour_ids, ignore_label, reduce_zero_label)


def _colours(about: Path) -> tuple[ColourIds, dict[int, tuple[int, int, int]]]:
    """What colours mean in label files, and the colour of each id, by dataset.json."""
    if not about.is_file():
        return (), {}
    meaning = read_meaning(about)
    return meaning.colour_ids, {i: colour for colour, i in meaning.colour_ids if i != IGNORED}


def _kind(label: Path, colour_of: dict[int, tuple[int, int, int]]) -> tuple[str, bool]:
    """The kind of a label file in words, and whether its palette shows an id in the colour of another class."""
    try:
        with Image.open(label) as image:
            mode = {"L": "8-bit grey", "P": "8-bit palette", "1": "1-bit", "RGB": "RGB", "RGBA": "RGBA"}.get(
                image.mode, "16-bit grey" if image.mode.startswith("I") else image.mode
            )
            if image.mode != "P" or not colour_of or (palette := image.getpalette("RGB")) is None:
                return mode, False
            shown = {i: (*palette[3 * i : 3 * i + 3],) for i in colour_of if 3 * i + 3 <= len(palette)}
    except Exception:  # count_ids tells it
        return "", False
    return mode, any(c != colour_of[i] and c in colour_of.values() for i, c in shown.items())


def _all(errors: Sequence[DataError]) -> DataError:
    """One error for files that have the same problem."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more files like it)" if len(errors) > 1 else ""
    return DataError(first.what + more, first.why, first.fix)


def _look_at_classes(
    found: Findings,
    colour_ids: ColourIds,
    ignore_label: int | Sequence[int] | None,
    reduce_zero_label: bool | None,
) -> None:
    """What the ids mean, ids that mean nothing, and the table of classes: of plain ids where no meaning is known."""
    pairs = found.pairs if found.kind == "labelled" else {"train": found.pairs["all"], "val": []}
    if not any(pairs.values()):
        return
    layout = None
    try:
        layout = give_meaning(
            found.folder, pairs["train"], pairs["val"], ignore_label=ignore_label, reduce_zero_label=reduce_zero_label
        )
        if wrong := [
            error for _, label in [*layout.train, *layout.val] if (error := _refused(layout.check_ids, label))
        ]:
            found.problems.append(_all(wrong))
        else:
            check_labels(layout)
    except DataError as error:
        found.problems.append(error)
    found.layout = layout
    counts: dict[str, Counter[int]] = {split: Counter() for split in found.pairs}
    photos: dict[str, Counter[int]] = {split: Counter() for split in found.pairs}
    empty: list[Path] = []
    if layout is None or found.problems:
        labels = [label for each in found.pairs.values() for _, label in each]
        found.in_colours |= {i for label in labels for i in count_ids(label, colour_ids)} == {0, IGNORED}
    for split, each in found.pairs.items():
        for _, label in each:
            ids = count_ids(label, colour_ids)
            kept = layout.count(label) if layout else dict(ids)
            counts[split].update({**kept, -1: sum(ids.values()) - sum(kept.values())})
            photos[split].update([*kept])
            if not kept:
                empty.append(label)
    numbers = [*range(len(layout.classes))] if layout else sorted({i for c in counts.values() for i in c} - {-1})
    names = dict(enumerate(layout.classes)) if layout else {i: f"id {i}" for i in numbers}
    palette = dict(enumerate(layout.palette)) if layout else dict(zip(numbers, colours(len(numbers)), strict=True))
    totals = {split: max(count.total() - count[-1], 1) for split, count in counts.items()}
    found.classes = [
        ClassRow(
            names[i], palette[i], {s: c[i] / totals[s] for s, c in counts.items()}, {s: photos[s][i] for s in photos}
        )
        for i in numbers
    ]
    found.ignored = {split: count[-1] / max(count.total(), 1) for split, count in counts.items()}
    found.notes += _remarks(found, empty)


def _refused(check: Callable[[Path], None], label: Path) -> DataError | None:
    try:
        check(label)
    except DataError as error:
        return error
    return None


def _remarks(found: Findings, empty: list[Path]) -> list[str]:
    """What training would not refuse, and may mistake."""
    notes = []
    if empty:
        notes.append(f"{len(empty)} labels are ignored all over, e.g. {empty[0]}: their photos teach nothing")
    layout = found.layout
    if layout is None:
        return notes
    if layout.source == "scan" and found.classes and any(found.classes[0].photos.values()):
        share = max(found.classes[0].shares.values())
        notes.append(
            f'id 0 is read as a class ({100 * share:.1f} % of the pixels); if it means "no class", add '
            '--reduce-zero-label, or a dataset.json with "zero_is_ignored": true'
        )
    for row in found.classes:
        if row.name.casefold().replace("_", " ").strip() in NO_CLASS:
            notes.append(
                f"{row.name!r} is trained as a class ({100 * max(row.shares.values()):.1f} % of the pixels); if it "
                'means "no class", list its id as "ignore" in dataset.json'
            )
    if found.kind == "labelled" and all(found.pairs.values()):
        only = {
            split: [r.name for r in found.classes if {s for s, n in r.photos.items() if n} == {split}]
            for split in SPLITS
        }
        notes += [f"in validation only, so they cannot be learned: {_some(only['val'])}"] * bool(only["val"])
        notes += [f"in training only, so they are not scored: {_some(only['train'])}"] * bool(only["train"])
    if absent := [row.name for row in found.classes if not any(row.photos.values())]:
        notes.append(f"in no label: {_some(absent)}")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _look_at_photos(found: Findings) -> None:
    """Decode every photo once: sizes, damaged ones, and the same picture in both splits."""
    split_of = {photo: split for split, pairs in found.pairs.items() for photo, _ in pairs}
    damaged: list[UnreadablePhoto] = []
    thumbs: dict[str, list[np.ndarray]] = defaultdict(list)
    owners: dict[str, list[Path]] = defaultdict(list)
    progress = Progress("photos", len(found.photos))
    with ThreadPoolExecutor(cores()) as threads:
        for i, (photo, seen) in enumerate(zip(found.photos, threads.map(_seen, found.photos), strict=True), 1):
            progress.update(i)
            if isinstance(seen, UnreadablePhoto):
                damaged.append(seen)
                continue
            size, thumb = seen
            found.sizes[size] += 1
            if (split := split_of.get(photo)) is not None:
                thumbs[split].append(thumb)
                owners[split].append(photo)
    progress.close()
    if damaged:
        used = "training passes over them" if found.kind == "labelled" else "they cannot be used"
        found.notes.append(f"{len(damaged)} photos cannot be read, {used}: e.g. {damaged[0].what} ({damaged[0].why})")
    if len(damaged) == len(found.photos):
        found.problems.append(_all(damaged))
    twice = []
    for same in _same_bytes(found.photos):
        first = {split_of.get(photo): photo for photo in same[::-1]}
        if "train" in first and "val" in first:
            twice.append((first["train"], first["val"]))
        else:
            found.notes.append(f"{len(same)} photos have one content: {same[0]}, {same[1]}" + " ..." * (len(same) > 2))
    if twice:
        found.notes.append(
            f"{len(twice)} photos are in training and in validation, e.g. {twice[0][0]} and {twice[0][1]}: "
            "scores are too good"
        )
    if thumbs["train"] and thumbs["val"]:
        alike = _alike(np.stack(thumbs["train"]), np.stack(thumbs["val"]))
        pairs = [(owners["train"][a], owners["val"][b]) for a, b in alike]
        if pairs := [pair for pair in pairs if pair not in twice]:
            found.notes.append(
                f"{len(pairs)} validation photos look the same as a training photo, e.g. {pairs[0][0]} and "
                f"{pairs[0][1]}: copies, or frames of one video, make scores too good"
            )


def _seen(photo: Path) -> tuple[tuple[int, int], np.ndarray] | UnreadablePhoto:
    """A photo's upright size and its grey thumbnail, float32 (THUMB * THUMB,)."""
    try:
        image = open_photo(photo, at_least=(4 * THUMB, 4 * THUMB))
        size = photo_size(photo)
    except UnreadablePhoto as error:
        return error
    if (size[0] < size[1]) != (image.width < image.height):  # a PNG may tell how to turn it after its pixels
        size = size[::-1]
    return size, np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX), np.float32).ravel()


def _same_bytes(photos: Iterable[Path]) -> list[list[Path]]:
    """Files of one content, where there are several; only files of one size are read."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for photo in photos:
        sizes[photo.stat().st_size].append(photo)
    found: dict[bytes, list[Path]] = defaultdict(list)
    for path in (path for paths in sizes.values() if len(paths) > 1 for path in paths):
        with open(path, "rb") as file:
            found[hashlib.file_digest(file, "sha256").digest()].append(path)
    return [paths for paths in found.values() if len(paths) > 1]


def _alike(train_ND: np.ndarray, val_MD: np.ndarray) -> list[tuple[int, int]]:
    """(training, validation) places of photos whose thumbnails differ by less than ``ALIKE`` on average."""
    found = []
    progress = Progress("compare", len(val_MD))
    for j, thumb_D in enumerate(val_MD):
        progress.update(j + 1)
        if thumb_D.std() < FLAT:
            continue
        differences_N = np.abs(train_ND - thumb_D).mean(1)
        if differences_N.min() < ALIKE:
            found.append((int(differences_N.argmin()), j))
    progress.close()
    return found
