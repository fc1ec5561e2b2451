"""Photos of every kind as 8-bit RGB, as a viewer shows them: the one opener of every command. numpy and Pillow only."""

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinymim.data.photo_files import tell
from tinymim.data.shards import read_shard, split_path
from tinymim.errors import DataError

Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels
DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras and scanners; what they fill of 16 bits is taken for the whole range
_ORIENTATION = 0x0112  # of EXIF: what to do to see the photo upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadablePhoto(DataError):
    """A photo that is damaged, or of a kind that cannot be shown in 8-bit RGB."""


def open_photo(path: str | Path, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A photo as a viewer shows it: upright as its EXIF says, 8-bit RGB, transparent parts white, its first frame.

    Args:
        path: The file.
        at_least: Width and height that suffice: a JPEG is decoded at the nearest size above, which is faster.

    Returns:
        A loaded Pillow image of mode RGB.

    Raises:
        UnreadablePhoto: no regular file, damaged, too large, or values with no agreed meaning.
    """
    with _reading(path) as image:
        if at_least is not None:
            image.draft("RGB", at_least)
        deep = any(";16" in str(tile[-1]) for tile in image.tile)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = to_rgb(image)
        if deep and image.mode.startswith("RGB") and max(high for _, high in image.getextrema()[:3]) < 16:
            raise ValueError("its 16-bit colours fill 12 bits or fewer; save it as an 8-bit picture")
        return rgb if turn is None else rgb.transpose(turn)


def open_crop(path: str | Path, choose: Callable[[tuple[int, int]], Box], side: int) -> Image.Image:
    """A part of a photo, as :func:`open_photo` shows it, decoded no finer than a resize to ``side`` pixels needs.

    libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 of its size in less time; the smallest of these is taken at which the part
    still has ``side`` pixels in both directions. Only the part is turned upright and made RGB.

    Args:
        path: The file.
        choose: Upright width and height -> box (left, top, right, bottom) in those pixels; called once.
        side: Pixels.

    Raises:
        UnreadablePhoto: see :func:`open_photo`.
    """
    with _reading(path) as image:
        if image.format in ("JPEG", "MPO"):
            size, orientation = image.size, _orientation(image)
            box = _stored_box(choose(size[::-1] if orientation >= 5 else size), size, orientation)
            most = min(box[2] - box[0], box[3] - box[1]) // side
            if most > 1 and (drafted := image.draft(None, (size[0] // most, size[1] // most))):
                scale = round(size[0] / drafted[1][2])  # 2, 4 or 8
                left, top, right, bottom = (round(edge / scale) for edge in box)
                box = left, top, right, bottom
            part: Image.Image = to_rgb(image.crop(box))
            return part.transpose(_UPRIGHT[orientation]) if orientation > 1 else part
    upright = open_photo(path)
    return upright.crop(choose(upright.size))


def photo_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a photo upright, in pixels, from the head of the file.

    Raises:
        UnreadablePhoto: no regular file, or no picture.
    """
    with _reading(path) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow has turned a TIFF's size itself
        return image.size[::-1] if turned else image.size


def to_rgb(image: Any) -> Any:
    """A Pillow image as 8-bit RGB, over white where it is transparent.

    Grey values of more than 8 bits keep their upper 8: of 16 bits, or of the 8, 10, 12 or 14 that they fill.

    Raises:
        ValueError: pixels that are not 8- or 16-bit values.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its pixels ({image.mode}) are not 8- or 16-bit values; save it as an 8-bit picture")
        depth = next(bits for bits in DEPTHS if pixels.max() < 1 << bits)
        if depth < 16 and pixels.max():
            tell(f"photos of 16-bit values that fill {depth} bits are taken for {depth}-bit ones")
        return Image.fromarray((pixels >> depth - 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _reading(path: str | Path) -> Iterator[Any]:
    """Open a picture; whatever a damaged file makes Pillow raise becomes :class:`UnreadablePhoto`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(_source(path)) as image:
                yield image
    except Exception as error:  # Pillow's decoders raise nearly everything, struct.error and KeyError among it
        why = str(error) or type(error).__name__
        raise UnreadablePhoto(f"cannot read the photo {path}", why, "copy the file again or remove it") from error


def _source(path: str | Path) -> Any:
    """What Pillow opens: the path of a file, or the bytes of one in a shard."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")  # opening a pipe would wait for ever
    except (NotADirectoryError, FileNotFoundError):
        if (where := split_path(path)) is None:
            raise
        return io.BytesIO(read_shard(where[0]).read(where[1]))
    return path


def _stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A box of an upright photo, in the pixels of the photo as it is stored.

    Args:
        box: Left, top, right, bottom.
        size: Stored width and height.
        orientation: EXIF's.
    """
    left, top, right, bottom = box
    if orientation >= 5:  # rows are columns
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _orientation(image: Any) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or a damaged one."""
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)  # a PNG's own getexif would decode the photo
    except Exception:
        return 1
    return value if value in _UPRIGHT else 1
