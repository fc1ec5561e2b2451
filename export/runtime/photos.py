"""Real photos for a file: found, read, resized and normalised by the file's own contract. numpy and Pillow only."""

from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.photo_files import list_photos
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.errors import DataError
from tinymim.progress import say


def load_photos(folder: str | Path, limit: int = 4) -> list[Any]:
    """The first readable photos of a folder (below it too), as upright Pillow RGB images.

    Raises:
        DataError: no folder, or no readable photo in it.
    """
    found: list[Any] = []
    bad: list[str] = []
    for path in list_photos(folder, option="--photos"):
        try:
            found.append(open_photo(path))
        except UnreadablePhoto as error:
            bad.append(f"{path.name} ({error.why})")
        if len(found) == limit:
            break
    if not found:
        raise DataError(
            f"no photos in {folder}", f"none of its images can be read: {', '.join(bad[:3])}", "choose another folder"
        )
    for name in bad:
        say(f"warning: skipped {name}")
    return found


def normalise(photo: Any, size: tuple[int, int], contract: dict[str, Any]) -> np.ndarray:
    """A Pillow RGB photo, resized to ``size`` -> float32 (3, H, W) as the file's contract says."""
    from PIL import Image

    return to_input(np.asarray(photo.resize((size[1], size[0]), Image.Resampling.BILINEAR)), contract)


def as_pixels(photo: Any) -> np.ndarray:
    """A Pillow image or an array as uint8 (H, W, 3)."""
    pixels = np.asarray(photo)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"a photo of {pixels.dtype} {pixels.shape} cannot be used",
            "the file takes three channels of 8 bits",
            "read it with tinymim.data.pixels.open_photo(path)",
        )
    return pixels


def to_input(pixels_HW3: np.ndarray, contract: dict[str, Any]) -> np.ndarray:
    """RGB pixels of the right size -> what the file takes for one photo (3, H, W): normalised float32, or uint8.

    Args:
        pixels_HW3: uint8 RGB, or float32 of the same range.
        contract: Metadata of the file: ``mean``, ``std`` (0-255 units) and ``input``.
    """
    if (contract.get("input") or {}).get("range") == "pixels":
        rounded = pixels_HW3 if pixels_HW3.dtype == np.uint8 else np.rint(pixels_HW3).astype(np.uint8)
        return np.ascontiguousarray(rounded.transpose(2, 0, 1))
    out = np.empty((3, *pixels_HW3.shape[:2]), np.float32)
    for channel, (mean, std) in enumerate(zip(contract["mean"], contract["std"], strict=True)):
        np.subtract(pixels_HW3[:, :, channel], np.float32(mean), out=out[channel], dtype=np.float32)
        out[channel] /= np.float32(std)
    return out
