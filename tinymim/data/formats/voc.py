"""Pascal VOC's segmentation: ``JPEGImages``, ``SegmentationClass`` (palette PNGs), ``ImageSets/Segmentation/*.txt``.

Pillow reads the palette PNGs: their pixels are the ids, 255 is the border that counts for no class. supervision reads
VOC's boxes and polygons of XML files, not these masks.
"""

import functools
from pathlib import Path

import numpy as np

from tinymim.data.dataset_json import MOST_CLASSES
from tinymim.data.formats.base import FIX, Sample, Source, photos_by_stem, register_format, text_of
from tinymim.data.label_files import IGNORED, read_ids
from tinymim.errors import DataError

CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
SETS = {"train": "train", "val": "val"}


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """VOC's colours: bit i of an id's three lowest bits, again and again, is bit 7 - i of red, green and blue."""
    return tuple(
        tuple(sum((number >> (3 * i + c) & 1) << (7 - i) for i in range(8)) for c in range(3))  # type: ignore[misc]
        for number in range(count)
    )


def is_voc(folder: Path) -> bool:
    """Whether a folder has VOC's two folders."""
    return (folder / "JPEGImages").is_dir() and (folder / "SegmentationClass").is_dir()


@register_format("voc", "JPEGImages/ and SegmentationClass/ of palette PNGs", is_voc)
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read the photos that ImageSets/Segmentation lists, or all that have a mask.

    Classes are VOC's 20 and background, or the lines of ``labels.txt`` or ``class_names.txt`` (as LabelMe's converter
    writes it) where there is one.
    """
    inside = next(iter(sorted(source.glob("**/SegmentationClass"))), None) if source.is_dir() else None
    root = source if is_voc(source) else inside.parent if inside else source
    if not is_voc(root):
        boxes = (source / "Annotations").is_dir()
        raise DataError(
            f"{source} has no VOC segmentation",
            "SegmentationClass or JPEGImages is missing" + (": Annotations holds boxes only" if boxes else ""),
            "give the folder that holds both (VOCdevkit/VOC2012); boxes do not train a segmentor",
        )
    classes = _classes(root)
    photos, masks = photos_by_stem(root / "JPEGImages"), photos_by_stem(root / "SegmentationClass")
    listed = {split: _listed(root, word) for split, word in SETS.items()}
    split_of = {name: split for split, names in listed.items() for name in names}
    both = sorted({*listed["train"]} & {*listed["val"]})
    if both:
        raise DataError(f"{both[0]} is in train.txt and in val.txt", f"{len(both)} names are in both", "list each once")
    names = [*split_of] or [name for name in masks if name in photos]
    for name in names:
        if name not in photos or name not in masks:
            where = "JPEGImages" if name not in photos else "SegmentationClass"
            raise DataError(
                f"{name} is listed in ImageSets/Segmentation", f"it is not in {root / where}", "add it, or remove it"
            )
    if not names:
        raise DataError(f"no labelled photos in {root}", "no mask has the name of a photo", "unpack the archive again")
    palette = voc_palette(len(classes))
    samples = [
        Sample(photos[n], n, split_of.get(n), functools.partial(_ids, masks[n], len(classes), palette)) for n in names
    ]
    left = len({*masks} & {*photos}) - len(names)
    notes = ["255, the border of objects, is ignored"]
    notes += [f"{left} masks are in neither train.txt nor val.txt and are left out"] * bool(left)
    return Source(samples, classes, palette, notes)


def _listed(root: Path, word: str) -> list[str]:
    file = root / "ImageSets" / "Segmentation" / f"{word}.txt"
    return [line.strip() for line in text_of(file).splitlines() if line.strip()] if file.is_file() else []


def _classes(root: Path) -> tuple[str, ...]:
    for name in ("class_names.txt", "labels.txt"):
        if (root / name).is_file():
            lines = [line.strip() for line in text_of(root / name).splitlines() if line.strip()]
            names = ["background" if line == "_background_" else line for line in lines if line != "__ignore__"]
            if not 2 <= len(set(names)) == len(names) <= MOST_CLASSES:
                raise DataError(f"the classes of {root / name}", f"2 to {MOST_CLASSES} different names are needed", FIX)
            return (*names,)
    return (*CLASSES,)


def _ids(mask: Path, classes: int, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Ids of a mask: a palette PNG's own, or of an RGB copy by VOC's colours."""
    void = ((224, 224, 192), IGNORED)
    ids_HW = read_ids(mask, (*zip(palette, range(classes), strict=True), void))
    if ((ids_HW >= classes) & (ids_HW != IGNORED)).any():
        wrong = int(ids_HW[ids_HW != IGNORED].max())
        raise DataError(
            f"{mask} holds the id {wrong}",
            f"{classes} classes are known",
            f"name all classes, one a line, in {mask.parent.parent / 'labels.txt'}",
        )
    return ids_HW.astype(np.uint8)
