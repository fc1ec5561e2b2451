"""Cityscapes (arXiv 1604.01685): ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png``, ``gtFine/SPLIT/CITY/*_labelIds.png``.

The 19 classes that are scored and their colours come from torchvision's copy of the published table.
"""

import functools
from pathlib import Path

import numpy as np

from tinymim.data.formats.base import FIX, Sample, Source, need_folder, photos_by_stem, register_format
from tinymim.data.label_files import IGNORED, read_ids
from tinymim.errors import DataError

PHOTO, SPLITS = "_leftImg8bit", ("train", "val")
LABELS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


def is_cityscapes(folder: Path) -> bool:
    """Whether a folder has Cityscapes' two folders."""
    return (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir()


@register_format("cityscapes", "leftImg8bit/ and gtFine/", is_cityscapes)
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read both splits; the ids of other labels than the 19 classes are ignored, as in its benchmark."""
    from torchvision.datasets import Cityscapes

    need_folder(source, "leftImg8bit/ and gtFine/")
    if not is_cityscapes(source):
        raise DataError(
            f"{source} is not Cityscapes",
            "leftImg8bit or gtFine is missing in it",
            "unpack both archives into one folder",
        )
    scored = sorted(
        (each for each in Cityscapes.classes if 0 <= each.train_id < IGNORED), key=lambda each: each.train_id
    )
    table = np.full(256, IGNORED, np.uint8)
    table[[each.id for each in scored]] = [each.train_id for each in scored]
    samples = []
    for split in SPLITS:
        photos = photos_by_stem(source / "leftImg8bit" / split) if (source / "leftImg8bit" / split).is_dir() else {}
        for stem, photo in photos.items():
            name = stem.removesuffix(PHOTO)
            labels = [source / "gtFine" / split / f"{name}{end}" for end in LABELS]
            label = next((path for path in labels if path.is_file()), None)
            if label is None:
                raise DataError(
                    f"{photo} has no label", f"{labels[1]} does not exist", "unpack gtFine_trainvaltest.zip"
                )
            made = label == labels[0]
            samples.append(
                Sample(photo, name, split, functools.partial(_ids, label, None if made else table, len(scored)))
            )
    if not samples:
        raise DataError(
            f"no photos in {source}", "leftImg8bit/train and leftImg8bit/val are empty", "unpack the archive again"
        )
    names, colours = zip(*((each.name, each.color) for each in scored), strict=True)
    return Source(samples, names, colours, ["the 19 classes of the benchmark; its other labels are ignored"])


def _ids(label: Path, table: np.ndarray | None, classes: int) -> np.ndarray:
    """Training ids of a label file; ``table`` maps label ids, None: it holds training ids."""
    ids_HW = read_ids(label)
    if ids_HW.max() > 255 or (table is not None and (ids_HW > 33).any() and (ids_HW[ids_HW > 33] != 255).any()):
        raise DataError(f"{label} holds the id {ids_HW.max()}", "Cityscapes' go up to 33", FIX)
    if table is not None:
        return table[ids_HW]
    if ((ids_HW >= classes) & (ids_HW != IGNORED)).any():
        raise DataError(f"{label} holds the id {ids_HW.max()}", f"training ids go up to {classes - 1}", FIX)
    return ids_HW.astype(np.uint8)
