"""Photos with label files of the same names that are not yet in ADE20K layout: in one folder, or in two.

``NAME.jpg`` and ``NAME.png`` side by side; or ``images/`` beside ``masks/``, ``labels/`` or ``annotations/``, where
sub-folders called training (train) and validation (val, valid) tell the split.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tinymim.data.label_files import jpeg, match_labels
from tinymim.data.photo_files import IMAGES, LABELS, photo_paths
from tinymim.errors import DataError

BESIDE = ("masks", "labels", LABELS, "mask", "label", "segmentation")
SPLITS = {"training": "train", "train": "train", "validation": "val", "val": "val", "valid": "val"}


class FlatPair(NamedTuple):
    """A photo and its label; ``name`` is the photo's below its split, without suffix; ``split`` None: not told."""

    name: str
    split: str | None
    photo: Path
    label: Path


@dataclass
class Flat:
    """What is in a folder.

    Attributes:
        pairs: Photos with a label, sorted.
        problems: Photos without label, doubles, labels that are no PNG.
    """

    pairs: list[FlatPair] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)

    @property
    def labels(self) -> list[Path]:
        """The label files."""
        return [pair.label for pair in self.pairs]


def find_flat(folder: Path) -> Flat:
    """The photos of a folder that have a label file of their name; none where no label is found."""
    images = folder / IMAGES
    if images.is_dir():
        places = [folder / name for name in BESIDE if (folder / name).is_dir()]
        for labels in places:
            pairs, problems = match_labels(images, labels)
            if pairs or len(places) == 1:
                return Flat([_named(photo, label, images) for photo, label in pairs], problems)
        return Flat()
    stems: dict[Path, list[Path]] = defaultdict(list)
    for path in sorted(map(Path, photo_paths(folder))):
        stems[path.with_suffix("")].append(path)
    flat, alone = Flat(), list[Path]()
    for paths in stems.values():
        pngs = [path for path in paths if path.suffix.lower() == ".png"]
        if len(paths) == 1:
            alone += paths
        elif len(paths) > 2 or len(pngs) == 2:
            flat.problems.append(
                DataError(
                    f"{len(paths)} files have the name {paths[0].with_suffix('')}",
                    "which is the photo and which its label cannot be known",
                    "keep one photo and one .png",
                )
            )
        elif not pngs:
            flat.problems.append(jpeg(paths[1]))
        else:
            photo = next(path for path in paths if path not in pngs)
            flat.pairs.append(_named(photo, pngs[0], folder))
    if flat.pairs and alone:
        flat.problems.append(
            DataError(
                f"{alone[0].name} in {folder} is alone" + (f" (and {len(alone) - 1} more files)" if alone[1:] else ""),
                "a photo and its label have one name: NAME.jpg and NAME.png",
                "add what is missing, or remove them",
            )
        )
    if not flat.pairs and alone:
        flat.problems.clear()  # photos without labels
    return flat


def _named(photo: Path, label: Path, top: Path) -> FlatPair:
    first, *rest = photo.relative_to(top).with_suffix("").parts
    split = SPLITS.get(first.casefold()) if rest else None
    return FlatPair("/".join(rest if split else (first, *rest)), split, photo, label)
