"""Little copies of the official ImageNet layouts, written for tests."""

from pathlib import Path

from PIL import Image

from tinymim.data.imagenet import CORRUPTIONS, SEVERITIES, wnids

ALL = wnids("imagenet")


def colour(number: int) -> tuple[int, int, int]:
    """A colour for each of the 1000 classes, far enough apart to survive JPEG."""
    return number // 40 * 10, number % 40 * 6, 128


def write_classes(root: Path, names, photos: int = 1) -> Path:
    """One sub-folder a class with plain photos in the class's colour (wnids) or any colour."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(photos):
            image = Image.new("RGB", (20, 24), colour(ALL.index(name) if name in ALL else i))
            image.save(root / name / f"{i}.JPEG", quality=95)
    return root


def write_corruptions(root: Path, names, wnids_of_each, *, grouped: bool = False) -> Path:
    """ImageNet-C as its tars unpack, with or without their groups."""
    for group, members in CORRUPTIONS.items():
        for name in members:
            for severity in SEVERITIES if name in names else ():
                write_classes(root / (group if grouped else "") / name / str(severity), wnids_of_each)
    return root
