"""Labelled class folders, and checks of the official ImageNet, ImageNet-A, -R and -C layouts.

A class folder has one sub-folder per class; class ids are the positions of the sorted names. ImageNet's sub-folders are
named by wnids (WordNet ids, "n01440764"), whose sorted order is the order of every ImageNet classifier's 1000 outputs.
The lists of wnids come with timm.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from tinymim.data.photo_files import IMAGES, LABELS, SUFFIXES, packed, packed_classes, photo_paths, subfolders
from tinymim.errors import ConfigError, DataError

# kind -> photos of the official sets (ImageNet: validation, training; ImageNet-C: of each severity folder)
PHOTOS = {"imagenet": (50_000, 1_281_167), "imagenet-a": (7_500,), "imagenet-r": (30_000,), "imagenet-c": (50_000,)}
# ImageNet-C's downloads and the corruptions in each; those of "extra" do not count towards mCE
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
SEVERITIES = range(1, 6)
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class ClassFolder:
    """Photos and their classes.

    Attributes:
        root: The folder.
        files: Photos, (N,), sorted by class and name.
        labels: Class ids, int64 (N,): positions in ``classes``.
        classes: Names of the classes, (K,).
        index: Position of each class among ImageNet's 1000, (K,); None if any class is not one of them.
    """

    root: Path
    files: list[Path]
    labels: np.ndarray
    classes: list[str]
    index: list[int] | None

    def __str__(self) -> str:
        return f"{self.root}: {len(self.files)} photos of {len(self.classes)} classes"

    def some(self, per_class: int, seed: int) -> "ClassFolder":
        """At most so many photos of each class, drawn by a seed; in the same order."""
        rng = np.random.default_rng(seed)
        kept = np.zeros(len(self.files), bool)
        for label in range(len(self.classes)):
            rows = np.flatnonzero(self.labels == label)
            kept[rng.permutation(rows)[:per_class]] = True
        return replace(self, files=[self.files[i] for i in np.flatnonzero(kept)], labels=self.labels[kept])


@dataclass(frozen=True)
class LayoutReport:
    """Result of checking an official set. With warnings, scores are possible, but not the official ones.

    Attributes:
        root: The folder.
        kind: A key of ``PHOTOS``.
        photos: Photos in it.
        warnings: Differences from the official set, one sentence each.
        corruptions: ImageNet-C only: corruptions with all five severities, and their folders.
    """

    root: Path
    kind: str
    photos: int
    warnings: list[str]
    corruptions: dict[str, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([f"{self.root}: {self.kind}, {self.photos} photos", *(f"warning: {w}" for w in self.warnings)])


@functools.cache
def wnids(kind: str) -> tuple[str, ...]:
    """The wnids of a set (a key of ``PHOTOS``), sorted: 1000, or the 200 of ImageNet-A and -R.

    Source: the lists that timm ships (Apache-2.0).
    """
    name = {"imagenet-a": "imagenet_a", "imagenet-r": "imagenet_r"}.get(kind, "imagenet")
    return tuple(resources.files("timm").joinpath(f"data/_info/{name}_synsets.txt").read_text("utf-8-sig").split())


def read_class_folder(folder: str | Path, classes: Sequence[str] | None = None) -> ClassFolder:
    """Read a folder with one sub-folder per class; sub-folders are searched recursively.

    Args:
        folder: The folder; or shards of one, see :func:`tinymim.data.photo_files.packed_classes`.
        classes: Names of the classes in the order of their ids, usually the training folder's. Classes that the folder
            lacks keep their ids. None: the names of the sub-folders, sorted.

    Raises:
        DataError: no such folder, no sub-folders, a sub-folder that is not a known class, a class without photos
            (``classes`` not given), or no photo at all.
    """
    root = Path(folder)
    shards = packed(root)
    found = packed_classes(shards, root) if shards else {path.name: _photos(path) for path in _subfolders(root)}
    if not found:
        raise _no_classes(root)
    if {IMAGES, LABELS} <= set(found):
        raise DataError(
            f"{root} is a labelled folder for segmentation, not a folder of classes",
            f"{IMAGES} and {LABELS} in it would count as classes",
            "give a folder with one sub-folder per class; for this one, see tinymim segment --help",
        )
    if set(found) <= SPLITS:
        raise DataError(
            f"{root} holds {', '.join(found)} and no classes",
            "the folder must have one sub-folder per class",
            f"give {' or '.join(str(root / name) for name in found)}",
        )
    if classes is None:
        empty = [name for name, files in found.items() if not files]
        if empty:
            raise DataError(
                f"{_count(empty, 'sub-folder')} of {root} without photos: {_some(empty)}",
                f"each would count as a class; photos end in {', '.join(SUFFIXES)}",
                "put photos there, or remove folders that are not classes",
            )
        classes = list(found)
    unknown = [name for name in found if name not in set(classes)]
    if unknown:
        raise DataError(
            f"{root} has {_count(unknown, 'unknown class', 'unknown classes')}: {_some(unknown)}",
            f"the {len(classes)} known ones are {_some(classes)}",
            "give a folder with the classes that the model was trained on, or remove the others from it",
        )
    names = [name for name in classes if found.get(name)]
    files = [file for name in names for file in found[name]]
    if not files:
        raise DataError(
            f"no photos in {root}",
            f"nothing in its class folders ends in {', '.join(SUFFIXES)}",
            "check the path, or unpack the photos again",
        )
    ids = {name: i for i, name in enumerate(classes)}
    labels = np.repeat([ids[name] for name in names], [len(found[name]) for name in names])
    places = {name: i for i, name in enumerate(wnids("imagenet"))}
    index = [places[name] for name in classes] if set(classes) <= set(places) else None
    return ClassFolder(root, files, labels.astype(np.int64), list(classes), index)


def check_layout(folder: str | Path, kind: str) -> LayoutReport:
    """Compare a folder with an official set.

    Args:
        folder: Folder of wnid folders; ImageNet-C: of ``[group/]corruption/severity/wnid`` folders.
        kind: "imagenet" (training or validation), "imagenet-a", "imagenet-r" or "imagenet-c".

    Returns:
        The :class:`LayoutReport`; missing classes, corruptions and severities and unusual numbers of photos are
        warnings.

    Raises:
        DataError: scores of this folder would mean something else: no classes or different ones, folders at another
            level, photos without class folders.
        ConfigError: an unknown ``kind``.
    """
    if kind not in PHOTOS:
        raise ConfigError(f"no dataset {kind!r}", "it is not an official set", f"use one of {', '.join(PHOTOS)}")
    root = Path(folder)
    if kind == "imagenet-c":
        return _check_corruptions(root)
    missing, photos = _check_classes(root, kind)
    warnings = []
    if missing:
        warnings.append(f"no photos of {len(missing)} of {len(wnids(kind))} classes: {_some(missing)}")
    if photos not in PHOTOS[kind]:
        warnings.append(f"{photos} photos; the official {kind} has {' or '.join(map(str, PHOTOS[kind]))}")
    return LayoutReport(root, kind, photos, warnings)


def _check_classes(root: Path, kind: str) -> tuple[list[str], int]:
    """Classes without photos, and the number of photos. Raises DataError for classes that ``kind`` does not have."""
    found = {path.name: len(_photos(path)) for path in _subfolders(root)}
    if not found:
        raise _no_classes(root)
    known = wnids(kind)
    unknown = [name for name in found if name not in known]
    other = [k for k in PHOTOS if wnids(k) != known and set(found) == set(wnids(k))]
    if other:
        raise DataError(f"{root} is not {kind}", f"its classes are those of {other[0]}", f"give it as {other[0]}")
    if unknown:
        deeper = [path for path in _subfolders(root) if any(p.name in known for p in _subfolders(path))]
        if deeper:
            why, fix = "the class folders are one level deeper", f"give {' or '.join(map(str, deeper))}"
        elif all(re.fullmatch(r"n\d{8}", name) for name in unknown):
            why = f"these are wnids, but not among its {len(known)}"
            fix = f"check that this is {kind}, or move them out of the folder"
        elif len(unknown) == len(found):
            why = f"class folders must be named by wnids, like {known[0]}"
            fix = "unpack the official download, or rename each folder to its wnid"
        else:
            why, fix = "every folder in it would be a class", "move them out of the folder"
        raise DataError(f"{root} has {_count(unknown, 'folder')} that {kind} does not have: {_some(unknown)}", why, fix)
    return [name for name in known if not found.get(name)], sum(found.values())


def _check_corruptions(root: Path) -> LayoutReport:
    official = [name for names in CORRUPTIONS.values() for name in names]
    places = [p for path in _subfolders(root) for p in (_subfolders(path) if path.name in CORRUPTIONS else [path])]
    found = {path.name: path for path in places if path.name in official}
    if not found:
        inside = [p for p in _subfolders(root) if {q.name for q in _subfolders(p)} & {*official, *CORRUPTIONS}]
        raise DataError(
            f"no corruption folder in {root}",
            "the corruptions are one level deeper" if inside else "it must hold gaussian_noise/1/n01440764/*.JPEG",
            f"give {inside[0]}" if inside else "give the folder that holds the corruptions, or their groups (noise ..)",
        )
    twice = [path for path in places if found.get(path.name, path) != path]
    if twice:
        raise DataError(
            f"{twice[0].name} is in {root} twice", f"{twice[0]} and {found[twice[0].name]}", "keep one of them"
        )
    warnings = []
    unknown = [path.name for path in places if path.name not in official]
    if unknown:
        warnings.append(f"left out, not corruptions of ImageNet-C: {_some(unknown)}")
    complete: dict[str, Path] = {}
    other_counts, lacking, photos = [], [], 0
    for name in (n for n in official if n in found):
        absent = [str(s) for s in SEVERITIES if not (found[name] / str(s)).is_dir()]
        if absent:
            warnings.append(f"{name} is left out, it has no severity {', '.join(absent)}")
            continue
        complete[name] = found[name]
        for severity in SEVERITIES:
            missing, count = _check_classes(found[name] / str(severity), "imagenet-c")
            photos += count
            if missing:
                lacking.append(f"{name}/{severity} {_some(missing)}")
            if count not in PHOTOS["imagenet-c"]:
                other_counts.append(f"{name}/{severity} {count}")
    if not complete:
        raise DataError(
            f"no corruption in {root} is complete",
            "; ".join(warnings),
            "unpack the missing severities (folders 1 to 5)",
        )
    absent = [name for name in official if name not in complete and name not in CORRUPTIONS["extra"]]
    if absent:
        warnings.append(f"no mCE without {_some(absent, 15)}")
    if lacking:
        warnings.append(f"classes without photos in {_count(lacking, 'severity folder')}: {_some(lacking, 2)}")
    if other_counts:
        warnings.append(
            f"{_count(other_counts, 'severity folder')} with other than the official {PHOTOS['imagenet-c'][0]} photos: "
            f"{_some(other_counts, 2)}"
        )
    return LayoutReport(root, "imagenet-c", photos, warnings, complete)


def _subfolders(folder: Path) -> list[Path]:
    """Direct sub-folders, sorted, without hidden ones. Raises DataError if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}", "a folder of class folders is needed", "check the path")
    return [folder / name for name in subfolders(folder)]


def _photos(folder: Path) -> list[Path]:
    """Photos anywhere below a folder, sorted."""
    return list(map(Path, sorted(photo_paths(folder))))


def _no_classes(root: Path) -> DataError:
    """The error for a folder without sub-folders."""
    if packed(root):
        return DataError(
            f"{root} is a folder of shards", "this command reads class folders", "unpack them: tar -xf SHARD.tar"
        )
    photos = _photos(root)
    if len(photos) > 1000 and photos[0].name.startswith("ILSVRC2012_val_"):
        return DataError(
            f"{root} holds {len(photos)} validation photos and no class folders",
            "ILSVRC2012_img_val.tar does not hold the classes; they are in ILSVRC2012_devkit_t12.tar.gz",
            'put both files into an empty FOLDER, pip install scipy, and run: python -c "from torchvision.datasets '
            "import ImageNet; ImageNet('FOLDER', 'val')\"; then give FOLDER/val",
        )
    return DataError(
        f"no class folders in {root}",
        f"its {len(photos)} photos are not in class folders" if photos else "it holds no folder",
        "sort the photos into one sub-folder per class" if photos else "give the folder that holds the class folders",
    )


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first names joined by commas, and the number of the others."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _count(names: Sequence[str], one: str, many: str = "") -> str:
    """A number and its word: 1 folder, 2 folders."""
    return f"{len(names)} {one if len(names) == 1 else many or one + 's'}"
