"""Photos of every kind as 8-bit RGB. numpy and Pillow only."""

from typing import Any

import numpy as np
from PIL import Image


def to_rgb(image: Any) -> Any:
    """A Pillow image as 8-bit RGB; 16-bit grey keeps its upper 8 bits, as OpenCV does (Pillow would clip it to white).

    Raises:
        ValueError: pixels that are not 8- or 16-bit values.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its pixels ({image.mode}) are not 8- or 16-bit values; save it as an 8-bit picture")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    return image.convert("RGB")
