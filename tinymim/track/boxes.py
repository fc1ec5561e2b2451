"""Boxes as arrays (..., 4): corners x, y, width, height in pixels (LaSOT's), and square crops around them. numpy."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

SMALLEST = 10.0  # pixels that a followed box keeps inside the frame, and the least of its sides (OSTrack)


def corners(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height -> left, top, right, bottom."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def from_corners(boxes: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom -> x, y, width, height."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def centres(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height -> centre x, y: (..., 2)."""
    return boxes[..., :2] + boxes[..., 2:] / 2


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x, y, width, height, pair by pair: (...,), 0 where both are empty."""
    one, two = corners(a), corners(b)
    sides = np.clip(np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2]), 0, None)
    both = sides.prod(-1)
    union = np.clip(a[..., 2:], 0, None).prod(-1) + np.clip(b[..., 2:], 0, None).prod(-1) - both
    return np.minimum(np.divide(both, union, out=np.zeros_like(both, dtype=np.float64), where=union > 0), 1)


def inside(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A box (4,) cut to a frame of ``size`` (width, height); at least :data:`SMALLEST` pixels of it stay (OSTrack)."""
    limit = np.array(size, np.float64)
    least = np.minimum(SMALLEST, limit)
    low = np.clip(box[:2], 0, limit - least)
    high = np.clip(box[:2] + box[2:], least, limit)
    return np.concatenate([low, np.maximum(high - low, least)])


class Square(NamedTuple):
    """A square of a frame that is cut out for the network, in pixels of the frame; it may reach beyond it."""

    left: float
    top: float
    side: float

    def to_crop(self, box: np.ndarray) -> np.ndarray:
        """A box of the frame -> centre x, y, width, height as fractions of the square."""
        return np.concatenate([(centres(box) - (self.left, self.top)) / self.side, box[2:] / self.side])

    def to_frame(self, fractions: np.ndarray) -> np.ndarray:
        """Centre x, y, width, height as fractions of the square -> a box of the frame."""
        size = fractions[2:] * self.side
        return np.concatenate([fractions[:2] * self.side + (self.left, self.top) - size / 2, size])

    def cut(self, frame: Image.Image, side: int) -> Image.Image:
        """The square as a picture of ``side`` x ``side`` pixels, black beyond the frame; nothing larger is made."""
        canvas, scale = Image.new("RGB", (side, side)), self.side / side  # pixels of the frame per pixel of the crop
        spans = []
        for start, end in zip((self.left, self.top), frame.size, strict=True):
            first, last = max(math.ceil(-start / scale), 0), min(math.floor((end - start) / scale), side)
            spans.append((first, last, max(start + first * scale, 0.0), min(start + last * scale, float(end))))
        (left, right, x0, x1), (top, bottom, y0, y1) = spans
        if left < right and top < bottom:
            part = frame.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
            canvas.paste(part, (left, top))
        return canvas


def square_around(box: np.ndarray, factor: float) -> Square:
    """The square with a box's centre whose side is ``factor`` times the root of its area (at least 2 pixels)."""
    side = max(factor * math.sqrt(max(float(box[2]), 0.0) * max(float(box[3]), 0.0)), 2.0)
    x, y = centres(box)
    return Square(float(x) - side / 2, float(y) - side / 2, side)
