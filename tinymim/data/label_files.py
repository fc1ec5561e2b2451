"""Label maps: which file is whose label, the ids in it, and signs that they were spoilt. numpy and Pillow only."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from tinymim.data.photo_files import photo_paths, tell
from tinymim.data.pixels import UnreadablePhoto, open_photo, photo_size
from tinymim.errors import DataError
from tinymim.files import atomic_path

IGNORED = 255
CHECKED_LABELS = 400  # labels looked at before work starts; every label is checked again when it is read
LOOKED_AT = 60  # labels looked at for ids that resizing or JPEG made up
RARE = 0.0005  # of the pixels
Pair = tuple[Path, Path]
ColourIds = tuple[tuple[tuple[int, int, int], int], ...]  # (RGB, id), ...
# what PNG's grey values of 2 and 4 bits are multiplied by when Pillow reads them: ids are the values themselves
_FEW_BITS: dict[object, int] = {"L;2": 85, "L;4": 17}


def read_ids(path: Path, colour_ids: ColourIds = ()) -> np.ndarray:
    """Ids of a label file, (H, W): unsigned, or int32 where the file has 32 bits.

    Args:
        path: The file.
        colour_ids: What the colours of an RGB file mean; without it such a file is refused.

    Raises:
        DataError: unreadable, a JPEG, not single-channel, or a colour that has no id.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise jpeg(path)
            if colour_ids and image.mode in ("RGB", "RGBA"):
                return ids_of_colours(np.asarray(image), path, colour_ids)
            if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
                raise DataError(
                    f"{path} is not a label map (its mode is {image.mode})",
                    "a label has one channel of class ids; colours are read where dataset.json has a palette",
                    'save it as a single-channel 8-bit PNG, or name the colours of the classes as "palette" in '
                    "dataset.json",
                )
            times = max((_FEW_BITS.get(str(tile[-1]), 1) for tile in image.tile), default=1)
            ids = np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        why = str(error) or type(error).__name__
        raise DataError(f"cannot read the label {path}", why, "copy the file again") from error
    return ids.astype(np.uint8) if ids.dtype == bool else ids // times if times > 1 else ids


def ids_of_colours(pixels_HWC: np.ndarray, path: Path, colour_ids: ColourIds) -> np.ndarray:
    """uint8 (H, W): the ids of RGB or RGBA pixels.

    Raises:
        DataError: two ids have one colour, a pixel has another colour than these, or is transparent.
    """
    ids = dict(colour_ids)
    if len(ids) < len(colour_ids):
        twice = Counter(colour for colour, _ in colour_ids).most_common(1)[0][0]
        raise DataError(
            f"{path} is a picture in colours, and two classes have the colour {twice}",
            "which of them its pixels are cannot be known",
            'give every class a colour of its own as "palette" in dataset.json',
        )
    wide_HWC = pixels_HWC.astype(np.int32)
    codes_HW = wide_HWC[..., 0] << 16 | wide_HWC[..., 1] << 8 | wide_HWC[..., 2]
    known, values = zip(*sorted((r << 16 | g << 8 | b, i) for (r, g, b), i in ids.items()), strict=True)
    places_HW = np.searchsorted(known, codes_HW).clip(max=len(known) - 1)
    wrong_HW = np.asarray(known)[places_HW] != codes_HW
    if pixels_HWC.shape[-1] == 4:
        wrong_HW |= pixels_HWC[..., 3] < 255
    if wrong_HW.any():
        y, x = np.unravel_index(int(wrong_HW.argmax()), wrong_HW.shape)
        colour = tuple(pixels_HWC[y, x].tolist())
        raise DataError(
            f"{path} holds the colour {colour} at the pixel x={x}, y={y}",
            f"{wrong_HW.sum()} of its pixels have a colour that no class has"
            + (", or are transparent" if len(colour) == 4 and colour[3] < 255 else ""),
            'name it in dataset.json under "palette" or, if it is no class, "ignore_palette"; masks must be resized by '
            "nearest neighbour only",
        )
    return np.asarray(values, np.uint8)[places_HW]


def save_mask(ids_HW: np.ndarray, path: str | Path, palette: Sequence[Sequence[int]]) -> None:
    """Write a mask as 8-bit palette PNG: pixel values are class ids, viewers show the colours. Atomic."""
    image = Image.fromarray(ids_HW)
    image.putpalette(bytes(value for colour in palette[:256] for value in colour).ljust(768, b"\0"))
    with atomic_path(path) as part:
        image.save(part, "PNG")


@functools.lru_cache(maxsize=600_000)
def _of_version(read: Callable[..., object], path: Path, modified: int, size: int, *more: object) -> object:
    return read(path, *more)


def _cached(read: Callable[..., object], path: Path, *more: object) -> object:
    """What ``read`` finds in a file, cached while the file does not change."""
    stat = path.stat()
    return _of_version(read, path, stat.st_mtime_ns, stat.st_size, *more)


def unique_ids(path: Path, colour_ids: ColourIds = ()) -> frozenset[int]:
    """Ids in a label file, cached while the file does not change."""
    return frozenset(count_ids(path, colour_ids))


def count_ids(path: Path, colour_ids: ColourIds = ()) -> Mapping[int, int]:
    """Ids in a label file and the pixels of each, cached while the file does not change; see :func:`read_ids`."""
    return _cached(_count, path, colour_ids)  # type: ignore[return-value]


def _count(path: Path, colour_ids: ColourIds) -> Mapping[int, int]:
    ids, counts = np.unique(read_ids(path, colour_ids), return_counts=True)
    return MappingProxyType(dict(zip(ids.tolist(), counts.tolist(), strict=True)))


def _label_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def spread(pairs: Sequence[Pair], most: int = CHECKED_LABELS) -> Sequence[Pair]:
    """At most this many of the pairs, evenly spread."""
    return pairs[:: -(-len(pairs) // most) or 1]


def find_pairs(images: Path, labels: Path) -> list[Pair]:
    """Photos of one split with their labels (the same name, .png in any case), sorted by name.

    Raises:
        DataError: a photo without label, or two photos or two labels of one name.
    """
    pairs, problems = match_labels(images, labels)
    if problems:
        raise problems[0]
    return pairs


def match_labels(images: Path, labels: Path) -> tuple[list[Pair], list[DataError]]:
    """The pairs of :func:`find_pairs`, and what it refuses."""
    problems: list[DataError] = []
    names: dict[Path, Path] = {}
    for photo in sorted(map(Path, photo_paths(images))) if images.is_dir() else []:
        if (other := names.setdefault(photo.with_suffix(""), photo)) is not photo:
            problems.append(_share_a_name("photos", other, photo, "they would share one label"))
    photos = [*names.values()]
    found: dict[Path, Path] = {}
    others: dict[Path, Path] = {}
    for path in map(Path, sorted(photo_paths(labels)) if photos and labels.is_dir() else []):
        key = path.relative_to(labels).with_suffix("")
        if path.suffix.lower() != ".png":
            others[key] = path
        elif (other := found.setdefault(key, path)) is not path:
            problems.append(_share_a_name("labels", other, path, "only one can be the label of their photo"))
    keys = [photo.relative_to(images).with_suffix("") for photo in photos]
    for key in keys:  # two linked folders of photos may share one of labels, which was searched once
        if key not in found and (path := labels / f"{key}.png").is_file():
            found[key] = path
    if without := [(photo, key) for photo, key in zip(photos, keys, strict=True) if key not in found]:
        photo, key = without[0]
        problems.append(
            jpeg(others[key])
            if key in others
            else DataError(
                f"{len(without)} of {len(photos)} photos in {images} have no label, the first is {photo.name}",
                f"{labels / key}.png does not exist",
                "add the label (same name, .png) or remove the photo",
            )
        )
    elif spare := sorted(set(found) - set(keys)):
        tell(f"{len(spare)} labels in {labels} have no photo and are left out, the first is {found[spare[0]].name}")
    return [(photo, found[key]) for photo, key in zip(photos, keys, strict=True) if key in found], problems


def _share_a_name(what: str, one: Path, other: Path, why: str) -> DataError:
    return DataError(f"two {what} have one name: {one} and {other.name}", why, "rename or remove one of them")


def jpeg(path: Path) -> DataError:
    """The error for a label that is no PNG."""
    return DataError(
        f"the label {path} is no PNG",
        "labels are read from PNG files; JPEG changes ids along every border, and they cannot be read back",
        "save the labels as PNG from where they were made",
    )


def check_sizes(pairs: Iterable[Pair], *, training: bool) -> None:
    """Check that photos and labels have one size, by the heads of the files.

    Args:
        pairs: The photos of one split with their labels.
        training: Pass over damaged photos, as training does.

    Raises:
        DataError: a label of another size than its upright photo, or a damaged file.
    """
    for photo, label in pairs:
        try:
            size, wanted = _cached(_label_size, label), _cached(photo_size, photo)  # type: ignore[arg-type]
            if size != wanted:  # a PNG may tell how to turn it after its pixels
                wanted = open_photo(photo).size
        except UnreadablePhoto:
            if not training:
                raise
        except Exception as error:
            raise DataError(f"cannot read the label {label}", str(error), "copy the file again") from error
        else:
            if size != wanted:
                raise wrong_size(label, size, wanted)  # type: ignore[arg-type]


def wrong_size(label: str | Path, size: tuple[int, int], photo: tuple[int, int]) -> DataError:
    """The error for a label of another size than its upright photo; sizes are (width, height)."""
    turned = ", turned as its EXIF says" if size == photo[::-1] else ""
    return DataError(
        f"{label} is {size[0]} x {size[1]} pixels, its photo {photo[0]} x {photo[1]}{turned}",
        "a label must give a class to every pixel of its photo",
        "make both the same size, upright",
    )


def made_up_ids(pairs: Sequence[Pair], ignored: frozenset[int]) -> tuple[list[int], list[int]]:
    """Ids that JPEG or a resize with interpolation made up, as far as a few labels show.

    Labels below 16 pixels are not looked at.

    Returns:
        Ids that surely are: many, and only thin lines and specks; an id that fills a pixel and its four neighbours
        anywhere is real. And ids that may be: three or more that fill less than ``RARE`` of the pixels each.
    """
    real, pixels = set[int](), Counter[int]()
    for _, label in spread(pairs, LOOKED_AT):
        ids = read_ids(label)
        if min(ids.shape) < 16:
            continue
        middle = ids[1:-1, 1:-1]
        around = (ids[:-2, 1:-1], ids[2:, 1:-1], ids[1:-1, :-2], ids[1:-1, 2:])
        real.update(np.unique(middle[np.logical_and.reduce([middle == other for other in around])]).tolist())
        found, counts = np.unique(ids, return_counts=True)
        pixels.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    thin = sorted(set(pixels) - real - ignored)
    rare = sorted(i for i, count in pixels.items() if count < RARE * pixels.total() and i not in ignored)
    return thin if real and len(thin) >= max(3, len(real) // 2) else [], rare if len(rare) >= 3 else []


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: "3, 5 to 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" if b > a + 1 else f"{a}, {b}" for a, b in runs)
