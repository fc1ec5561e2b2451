"""Generated sequences with known truth: a textured sprite that moves, turns, grows, is covered and leaves the frame.

Each has distractors (one of the target's shape and colours, with another texture), a bar that passes in front of all,
a moving background and changing light. The numbers follow from (seed, number of the sequence). numpy and Pillow only.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tinymim.errors import ConfigError
from tinymim.files import atomic_folder
from tinymim.progress import Progress
from tinymim.track.sequences import ABSENT, FRAMES, TRUTH

HIDDEN = 0.02  # less of the target than this share is visible: it is fully occluded


def generate_sequences(
    folder: str | Path,
    *,
    sequences: int = 24,
    frames: int = 60,
    size: tuple[int, int] = (240, 320),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a root of flat sequences ``scene_0000/img/00000001.jpg``, which :func:`read_sequences` reads.

    Args:
        folder: The root, new or empty.
        sequences: Their number.
        frames: Frames of each.
        size: Height and width, pixels.
        seed: Of all random numbers.
        overwrite: Replace the folder.

    Raises:
        ConfigError: the folder exists, or numbers that are not possible.
    """
    if min(sequences, frames) < 1 or min(size) < 64 or max(size) > 4096 or seed < 0:
        raise ConfigError(
            f"{sequences} sequences of {frames} frames of {size[0]}x{size[1]} pixels, seed {seed}",
            "at least one of each is needed, and sides from 64 to 4096 pixels",
            "e.g. --sequences 24 --frames 60 --size 240 320 --seed 0",
        )
    with atomic_folder(folder, replace=overwrite) as part:
        line = Progress("generate", sequences)
        for number in range(sequences):
            _write(part / f"scene_{number:04d}", np.random.default_rng([seed, number]), frames, size)
            line.update(number + 1, images=frames)
        line.close(f"{sequences} sequences, {sequences * frames} frames")
    return Path(folder)


def _write(folder: Path, rng: np.random.Generator, frames: int, size: tuple[int, int]) -> None:
    scene, truth = _Scene(rng, frames, size), []
    covered, gone = [], []
    (folder / FRAMES).mkdir(parents=True)
    for i in range(frames):
        picture, box, share = scene.frame(i)
        picture.save(folder / FRAMES / f"{i + 1:08d}.jpg", quality=92)
        truth.append(",".join(map(str, box)))
        gone.append(int(box[2] == 0))
        covered.append(int(box[2] > 0 and share < HIDDEN))
    (folder / TRUTH).write_text("\n".join(truth) + "\n", "utf-8")
    for name, flags in zip(ABSENT, (covered, gone), strict=True):
        (folder / name).write_text(",".join(map(str, flags)) + "\n", "utf-8")


class _Scene:
    """Everything of a sequence that is drawn before its first frame."""

    def __init__(self, rng: np.random.Generator, frames: int, size: tuple[int, int]) -> None:
        self.size, self.frames = (size[1], size[0]), frames  # width, height
        short, shape = min(size), int(rng.integers(3))
        colours = rng.uniform(30, 225, (2, 3))
        self.back = _texture(rng, (2 * size[0], 2 * size[1]), 48, rng.uniform(40, 200, (2, 3)))
        pan = [_waves(rng, frames, 0.25) for _ in range(2)]
        self.pan = np.stack([(0.5 + p) * side for p, side in zip(pan, self.size, strict=True)], 1)
        side = rng.uniform(0.16, 0.26) * short
        leaves = rng.random() < 0.25 and frames >= 20
        self.target = _Sprite(rng, frames, self.size, side, shape, colours, leaves=leaves)
        self.others = [
            _Sprite(rng, frames, self.size, side * rng.uniform(0.8, 1.2), kind, paint)
            for kind, paint in ((shape, colours), (int(rng.integers(3)), rng.uniform(30, 225, (2, 3))))
        ]
        wide = int(rng.uniform(0.5, 1.6) * side)
        bar = _texture(rng, (size[0], wide), 12, rng.uniform(40, 200, (2, 3)))
        self.bar, start = bar, rng.uniform(0.3, 0.8) * frames  # it crosses the frame once, in a third of the frames
        self.bar_at = (np.arange(frames) - start) / max(frames / 3, 1) * (self.size[0] + wide) - wide
        self.light = 1 + 0.8 * _waves(rng, frames, 0.25)

    def frame(self, i: int) -> tuple[Image.Image, tuple[int, int, int, int], float]:
        """Picture, true box (x, y, width, height; zeros: outside) and the visible share of the target."""
        left, top = (round(float(v)) for v in self.pan[i])
        picture = self.back.crop((left, top, left + self.size[0], top + self.size[1]))
        for sprite in self.others:
            sprite.paste(picture, i)
        mask = self.target.paste(picture, i)
        bounds, whole = mask.getbbox(), self.target.pixels(i)
        bar = (round(float(self.bar_at[i])), 0)
        picture.paste(self.bar, bar)
        mask.paste(0, (*bar, bar[0] + self.bar.width, self.bar.height))
        seen = int((np.asarray(mask) > 0).sum()) / max(whole, 1)
        lit = np.clip(np.asarray(picture, np.float32) * self.light[i], 0, 255).astype(np.uint8)
        if bounds is None:
            return Image.fromarray(lit), (0, 0, 0, 0), 0.0
        x0, y0, x1, y1 = bounds
        return Image.fromarray(lit), (x0, y0, x1 - x0, y1 - y0), seen


class _Sprite:
    """A textured shape on its way through the frame."""

    def __init__(
        self,
        rng: np.random.Generator,
        frames: int,
        size: tuple[int, int],
        side: float,
        shape: int,
        colours: np.ndarray,
        *,
        leaves: bool = False,
    ) -> None:
        tall = int(side * rng.uniform(0.7, 1.4))
        self.skin = _texture(rng, (2 * tall, 2 * int(side)), 6, colours)  # drawn at twice the size
        self.skin.putalpha(_mask(self.skin.size, shape))
        self.scale = np.exp(1.6 * _waves(rng, frames, 0.25)) / 2
        self.angle = 60 * _waves(rng, frames, 0.25)
        ways = [0.5 + _waves(rng, frames, 0.4) for _ in range(2)]
        if leaves:  # out at the right and back, in the last third
            out = np.clip(1 - np.abs(np.arange(frames) / frames - 0.8) / 0.15, 0, 1)
            ways[0] = ways[0] + 1.6 * out
        self.at = np.stack(ways, 1) * size

    def turned(self, i: int) -> Image.Image:
        """The sprite at its size and angle in a frame."""
        wide, tall = (max(round(side * float(self.scale[i])), 2) for side in self.skin.size)
        small = self.skin.resize((wide, tall), Image.Resampling.BILINEAR)
        return small.rotate(float(self.angle[i]), Image.Resampling.BILINEAR, expand=True)

    def pixels(self, i: int) -> int:
        """Its pixels, seen or not."""
        return int((np.asarray(self.turned(i).getchannel("A")) > 127).sum())

    def paste(self, picture: Image.Image, i: int) -> Image.Image:
        """Paste it; the mask of its pixels in the frame."""
        sprite = self.turned(i)
        alpha = sprite.getchannel("A").point(lambda value: 255 if value > 127 else 0)
        corner = tuple(round(float(c) - s / 2) for c, s in zip(self.at[i], sprite.size, strict=True))
        mask = Image.new("L", picture.size)
        mask.paste(255, (corner[0], corner[1]), alpha)
        picture.paste(sprite, (corner[0], corner[1]), alpha)
        return mask


def _waves(rng: np.random.Generator, frames: int, most: float) -> np.ndarray:
    """A smooth curve from -most to most: three sines of a few periods per hundred frames."""
    time = np.arange(frames) / 100
    waves: Any = sum(
        weight * np.sin(2 * math.pi * (rng.uniform(0.3, 1.0) * speed * time + rng.random()))
        for weight, speed in ((0.6, 1), (0.3, 2), (0.1, 4))
    )
    return most * waves


def _texture(rng: np.random.Generator, size: tuple[int, int], grain: int, colours: np.ndarray) -> Image.Image:
    """Noise of two grains between two colours, (height, width)."""
    both = np.zeros(size)
    for share, cell in ((0.65, grain), (0.35, max(grain // 3, 2))):
        cells = rng.random((size[0] // cell + 2, size[1] // cell + 2)).astype(np.float32)
        both += share * np.asarray(Image.fromarray(cells).resize(size[::-1], Image.Resampling.BICUBIC))
    mixed = np.clip((both - 0.5) * 2.2 + 0.5, 0, 1)[..., None]
    return Image.fromarray((colours[0] * (1 - mixed) + colours[1] * mixed).astype(np.uint8))


def _mask(size: tuple[int, int], shape: int) -> Image.Image:
    """A rectangle, an ellipse or a diamond."""
    mask = Image.new("L", size)
    draw, (wide, tall) = ImageDraw.Draw(mask), (size[0] - 1, size[1] - 1)
    if shape == 0:
        draw.rectangle((0, 0, wide, tall), fill=255)
    elif shape == 1:
        draw.ellipse((0, 0, wide, tall), fill=255)
    else:
        draw.polygon(((wide // 2, 0), (wide, tall // 2), (wide // 2, tall), (0, tall // 2)), fill=255)
    return mask
