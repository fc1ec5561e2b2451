"""The canvas for drawing scenes: perspective, noise, smooth shapes, a photo and its label. NumPy and Pillow only.

Legend: H, W = size in pixels; alpha_HW = share of a pixel that a shape covers, 0 to 1.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLE = 3  # shapes are drawn this much larger and averaged, so that edges are smooth
# sky at the top, sky at the horizon, colour of the light
HOURS = (
    ((86, 142, 214), (198, 220, 236), (1.04, 1.02, 0.98)),
    ((58, 112, 196), (168, 204, 234), (1.06, 1.03, 0.97)),
    ((132, 148, 166), (206, 210, 212), (0.90, 0.92, 0.95)),
    ((96, 104, 164), (244, 188, 138), (1.02, 0.88, 0.76)),
    ((120, 166, 196), (234, 222, 196), (1.05, 1.00, 0.90)),
)
Points = Sequence[tuple[float, float]]
Area = tuple[tuple[slice, slice], np.ndarray]  # rows and columns, alpha_HW of that box


class Canvas:
    """A photo and its label, painted from the back to the front."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.width, self.height, self.rng = width, height, rng
        self.photo_HW3 = np.zeros((height, width, 3), np.float32)
        self.label_HW = np.zeros((height, width), np.uint8)
        self.y_HW, self.x_HW = np.mgrid[0:height, 0:width].astype(np.float32)
        self.horizon = height * rng.uniform(0.36, 0.52)
        self.vanish = width * rng.uniform(0.25, 0.75)  # where roads and furrows meet the horizon
        self.top, self.haze, self.light = (np.array(c, np.float32) for c in HOURS[rng.integers(len(HOURS))])
        self.fade = 0.0  # share of haze in the next shapes
        self.grain_HW, self.patches_HW = self.noise(height / 5, width / 5, 2), self.noise(6, 6, 2)
        self.sun = 1.0 if rng.random() < 0.5 else -1.0  # light from the right or the left

    def pick(self, colours: Sequence[tuple[int, int, int]], spread: float = 14) -> np.ndarray:
        """One of ``colours``, slightly varied: (3,)."""
        base = np.array(colours[int(self.rng.integers(len(colours)))], np.float32)
        return base + self.rng.normal(0, spread) + self.rng.normal(0, spread / 3, 3).astype(np.float32)

    def noise(self, rows: float, columns: float, octaves: int = 3) -> np.ndarray:
        """Smooth noise (H, W), mean 0, amplitude about 1, with ``rows`` x ``columns`` bumps in its coarsest octave."""
        total = np.zeros((self.height, self.width), np.float32)
        for octave in range(octaves):
            grid = (max(2, round(rows * 2**octave)), max(2, round(columns * 2**octave)))
            grid = (min(grid[0], self.height), min(grid[1], self.width))
            bumps = Image.fromarray(self.rng.standard_normal(grid, np.float32))
            total += np.asarray(bumps.resize((self.width, self.height), Image.Resampling.BICUBIC)) * 0.55**octave
        return total

    def shape(self, *polygons: Points, ellipses: Sequence[tuple[float, float, float, float]] = ()) -> Area:
        """Coverage of polygons and of ellipses (centre x, centre y, radius x, radius y), within their bounding box."""
        corners = [point for points in polygons for point in points]
        corners += [(x + i * rx, y + i * ry) for x, y, rx, ry in ellipses for i in (-1, 1)]
        x0, x1 = (int(np.clip(f(x for x, _ in corners) + d, 0, self.width)) for f, d in ((min, -1), (max, 2)))
        y0, y1 = (int(np.clip(f(y for _, y in corners) + d, 0, self.height)) for f, d in ((min, -1), (max, 2)))
        box = (slice(y0, y1), slice(x0, x1))
        if x0 >= x1 or y0 >= y1:
            return box, np.zeros((0, 0), np.float32)
        s = OVERSAMPLE
        large = Image.new("L", ((x1 - x0) * s, (y1 - y0) * s))
        draw = ImageDraw.Draw(large)
        for points in polygons:
            draw.polygon([((x - x0) * s, (y - y0) * s) for x, y in points], fill=255)
        for x, y, rx, ry in ellipses:
            draw.ellipse([(v - o) * s for v, o in ((x - rx, x0), (y - ry, y0), (x + rx, x0), (y + ry, y0))], fill=255)
        return box, np.asarray(large.reduce(s), np.float32) / 255

    def paint(
        self, area: Area, colour: np.ndarray, label: int | None, shade: np.ndarray | float = 1, opacity: float = 1
    ) -> None:
        """Paint ``colour``, (3,) or (H, W, 3), times ``shade``, (H, W); label pixels that are at least half covered."""
        box, alpha_HW = area
        if not alpha_HW.size:
            return
        layer_HW3 = np.broadcast_to(colour[box] if colour.ndim == 3 else colour, (*alpha_HW.shape, 3)).astype(
            np.float32
        )
        layer_HW3 *= shade[box][..., None] if isinstance(shade, np.ndarray) else shade
        if self.fade:
            layer_HW3 += self.fade * (self.haze - layer_HW3)
        layer_HW3 -= self.photo_HW3[box]
        layer_HW3 *= alpha_HW[..., None] * opacity
        self.photo_HW3[box] += layer_HW3
        if label is not None:
            self.label_HW[box][alpha_HW >= 0.5] = label

    def spread(self, alpha_HW: np.ndarray) -> Area:
        """An area as large as the photo."""
        return (slice(None), slice(None)), alpha_HW

    def depth(self) -> np.ndarray:
        """0 at the horizon and above, 1 at the lower edge: (H, W)."""
        return np.clip((self.y_HW - self.horizon) / (self.height - self.horizon), 0, 1)

    def size_at(self, y: float) -> float:
        """Perspective: height in pixels of an object one metre tall that stands at row ``y``."""
        return (y - self.horizon) / 1.9 + 0.02 * self.height

    def below(self, line_W: np.ndarray) -> Area:
        """Everything under a line given as a row per column."""
        return self.spread(np.clip(self.y_HW - line_W[None] + 0.5, 0, 1))

    def hills(self, level: float, height: float, rough: float = 0.5) -> np.ndarray:
        """A ridge: one row per column (W,), ``height`` pixels above ``level`` at most."""
        x = np.arange(self.width, dtype=np.float32) / self.width
        ridge = np.zeros(self.width, np.float32)
        for octave in range(5):
            waves = x * self.rng.uniform(0.7, 1.3) * 2**octave + self.rng.random()
            ridge += np.sin(2 * np.pi * waves) * rough**octave
        return level - height * (0.55 + 0.45 * ridge / np.abs(ridge).max())


def trapeze(x: float, y0: float, half0: float, y1: float, half1: float) -> Points:
    """A trapezium centred on column ``x``: half its width is ``half0`` at row ``y0`` and ``half1`` at row ``y1``."""
    return ((x - half0, y0), (x + half0, y0), (x + half1, y1), (x - half1, y1))


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle."""
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
