"""``tinymim data --split`` and ``--from``: labelled photos of another form become ADE20K layout."""

import errno
import os
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinymim.cores import cores
from tinymim.data.dataset_json import read_meaning
from tinymim.data.flat import find_flat
from tinymim.data.folders import SPLITS, Layout, colours, read_layout
from tinymim.data.formats import FORMATS, Sample
from tinymim.data.label_files import IGNORED, check_sizes, count_ids, save_mask, wrong_size
from tinymim.data.new_folder import check_new, new_folder
from tinymim.data.photo_files import IMAGES, LABELS, overheard
from tinymim.data.pixels import open_photo, photo_size
from tinymim.data.split import check_share, choose_validation, frames_of_videos
from tinymim.errors import ConfigError, DataError, did_you_mean
from tinymim.files import write_json
from tinymim.progress import Progress

SHARE = 0.2  # of validation photos, where a format tells none
_AT_ONCE = 64  # labels in memory


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        layout: The new folder, as training reads it.
        notes: What was left out or decided.
        linked: Photos that are hard links to their originals; the others are copies.
    """

    layout: Layout
    notes: list[str]
    linked: int


def split_folder(
    folder: str | Path,
    out: str | Path,
    *,
    share: float = SHARE,
    seed: int = 0,
    ignore: Sequence[int] = (),
    copy: bool = False,
) -> Converted:
    """Write the photos of a folder and their label files as training and validation photos; labels stay as they are.

    Args:
        folder: Photos and labels of the same names (:mod:`tinymim.data.flat`), or ADE20K layout without validation.
        out: A new folder.
        share: Of validation photos.
        seed: Of the choice.
        ignore: Ids besides 255 that do not count: written as ``dataset.json``, with names for the others to edit.
        copy: Copy photos; else they are hard links where the file system has them. Labels are always copied.

    Raises:
        ConfigError: ``out`` is there already or lies in ``folder``; ``share`` is not between 0 and 1; ``ignore``
            beside a ``dataset.json``.
        DataError: no labels; photos without one; labels that training refuses.
        TinyMIMError: the disk is full, or ``out`` cannot be written.
    """
    folder, out = _request(folder, out, share)
    flat = find_flat(folder)
    if not flat.pairs and not flat.problems:
        raise DataError(
            f"no labels in {folder}",
            "no photo has a .png of its name, beside it or in masks/, labels/ or annotations/",
            "put photos into images/ and labels into masks/, with the same names",
        )
    if flat.problems:
        raise flat.problems[0]
    if any(pair.split == "val" for pair in flat.pairs):
        raise DataError(f"{folder} is split already", "it has a folder of validation photos", f"tinymim data {folder}")
    about = folder / "dataset.json"
    if ignore and about.is_file():
        raise ConfigError(
            f"--ignore-label and {about}",
            "the file says what is ignored",
            f'put the ids into its "ignore": {[*ignore]}',
        )
    colour_ids = read_meaning(about).colour_ids if about.is_file() else ()
    progress, classes = Progress("labels", len(flat.pairs)), []
    for i, (_, _, photo, label) in enumerate(flat.pairs, 1):
        check_sizes([(photo, label)], training=False)
        classes.append({*count_ids(label, colour_ids)})
        progress.update(i)
    progress.close()
    if set().union(*classes) == {0, IGNORED} and not colour_ids:
        raise DataError(
            f"the labels of {folder} are masks of 0 and 255",
            "255 is always ignored: one class would be left",
            f"tinymim data {shlex.quote(str(folder))} --from rgb-masks --out {shlex.quote(str(out))}",
        )
    chosen, notes = choose_validation([each - {IGNORED, *ignore} for each in classes], share, seed), []
    if frames := frames_of_videos([pair.name for pair in flat.pairs]):
        notes.append(
            f"{frames} of {len(flat.pairs)} names are numbered in a row: if they are frames of videos, near-identical "
            "ones are in both splits, and scores too good; then split by video: images/training, images/validation"
        )
    with new_folder(out) as part:
        splits = ["val" if i in chosen else "train" for i in range(len(flat.pairs))]
        places = _places([pair.name for pair in flat.pairs], splits)
        linked = _put_photos(part, [pair.photo for pair in flat.pairs], places, copy)
        for place, label in zip(places, flat.labels, strict=True):
            shutil.copyfile(label, _made(part / LABELS / f"{place}.png"))
        if about.is_file():
            shutil.copyfile(about, part / about.name)
        elif ignore:
            read = read_layout(part, ignore_label=[*ignore])
            named = {"classes": [*read.classes], "palette": [[*colour] for colour in read.palette]}
            write_json(part / about.name, named | {"ignore": [*ignore]})
        _read_back(part, out)
    return Converted(read_layout(out), notes, linked)


def convert(
    source: str | Path,
    format: str,
    out: str | Path,
    *,
    share: float | None = None,
    seed: int = 0,
    ignore_unlabelled: bool = False,
    copy: bool = False,
) -> Converted:
    """Write data of another format as ADE20K layout with a ``dataset.json``.

    Args:
        source: The data.
        format: One of :data:`tinymim.data.formats.FORMATS`.
        out: A new folder.
        share: Of validation photos, where the format does not tell the splits; None: 0.2.
        seed: Of that choice.
        ignore_unlabelled: Pixels of no object are ignored; else they are the class "background".
        copy: Copy photos; else they are hard links where the file system has them.

    Raises:
        ConfigError: ``out`` is there already or lies in ``source``, an unknown format, or a share for data that
            are split.
        DataError: data that cannot be read; the file and the place are named.
        TinyMIMError: the disk is full, ``out`` cannot be written, or a package is missing.
    """
    if format not in FORMATS:
        raise ConfigError(f"--from {format}", f"known are {', '.join(FORMATS)}", did_you_mean(format, FORMATS))
    source, out = _request(source, out, SHARE if share is None else share)
    found = FORMATS[format].read(source, ignore_unlabelled)
    told = {sample.split for sample in found.samples}
    if told == {"train", "val"} and share is not None:
        raise ConfigError(
            f"--split and {source}", "the data tell training and validation photos themselves", "leave it out"
        )
    if not found.samples:
        raise DataError(
            f"no labelled photos in {source}", "; ".join(found.notes), f"--from {format} reads {FORMATS[format].about}"
        )
    palette = found.palette or colours(len(found.classes))
    with new_folder(out) as part:
        labels = [_made(part / "labels" / f"{i}.png") for i in range(len(found.samples))]
        classes = _write_labels(found.samples, labels, palette)
        splits = [sample.split or "train" for sample in found.samples]
        if told != {"train", "val"}:
            chosen = choose_validation(classes, SHARE if share is None else share, seed)
            splits = ["val" if i in chosen else "train" for i in range(len(labels))]
        places = _places([sample.name for sample in found.samples], splits)
        linked = _put_photos(part, [sample.photo for sample in found.samples], places, copy)
        for place, label in zip(places, labels, strict=True):
            os.rename(label, _made(part / LABELS / f"{place}.png"))
        (part / "labels").rmdir()
        write_json(part / "dataset.json", {"classes": [*found.classes], "palette": [[*colour] for colour in palette]})
        _read_back(part, out)
    return Converted(read_layout(out), found.notes, linked)


def _request(source: str | Path, out: str | Path, share: float) -> tuple[Path, Path]:
    source, out = Path(source), Path(out)
    out = out if out.name else out.absolute()  # "."
    if not source.exists():
        raise ConfigError(f"nothing at {source}", "there is no such file or folder", "check the path")
    check_share(share)
    check_new(out, source if source.is_dir() else None, "labelled photos are")
    return source, out


def _write_labels(
    samples: Sequence[Sample], places: Sequence[Path], palette: Sequence[Sequence[int]]
) -> list[set[int]]:
    """Make, check and save the labels; the classes in each."""

    def write(sample: Sample, place: Path) -> set[int]:
        ids_HW = sample.ids()
        if ids_HW.shape[::-1] != (size := photo_size(sample.photo)) and ids_HW.shape[::-1] != (
            size := open_photo(sample.photo).size  # a PNG may tell how to turn it after its pixels
        ):
            raise wrong_size(f"the label of {sample.photo}", ids_HW.shape[::-1], size)
        save_mask(ids_HW, place, palette)
        return {*np.unique(ids_HW).tolist()} - {IGNORED}

    classes: list[set[int]] = []
    progress = Progress("convert", len(samples))
    with ThreadPoolExecutor(cores()) as threads:
        for first in range(0, len(samples), _AT_ONCE):
            last = first + _AT_ONCE
            classes += threads.map(write, samples[first:last], places[first:last])
            progress.update(len(classes))
    progress.close(f"{len(classes)} photos")
    return classes


def _places(names: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Where each photo goes, below images/ and annotations/, without suffix; no two of them, on any file system."""
    places: list[str] = []
    taken = set[str]()
    for name, split in zip(names, splits, strict=True):
        place = f"{SPLITS[split]}/{name}"
        while place.casefold() in taken:
            place += "_"
        taken.add(place.casefold())
        places.append(place)
    return places


def _put_photos(part: Path, photos: Sequence[Path], places: Sequence[str], copy: bool) -> int:
    """Link or copy photos into a layout; how many are linked."""
    linked = 0
    for photo, place in zip(photos, places, strict=True):
        to = _made(part / IMAGES / f"{place}{photo.suffix}")
        try:
            if not copy:
                os.link(photo.resolve(), to)
                linked += 1
                continue
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        shutil.copyfile(photo, to)
    return linked


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _read_back(part: Path, out: Path) -> None:
    """Refuse what training would refuse, in the names of the folder to be."""
    try:
        with overheard():
            layout = read_layout(part)
            for split in SPLITS:
                layout.need(split)
    except DataError as error:
        what, why, fix = (text.replace(str(part), str(out)) for text in (error.what, error.why, error.fix))
        raise DataError(what, why, fix) from None
