"""Augmentation that a seed replays: the same photo and seed give the same pixels, in every process and for ever.

A store of targets keeps only the seed of a view (TinyViT, arXiv 2207.10666, section 3.1); who trains from it makes the
view again. So every draw comes from one generator, Python's ``random.Random(seed)``, whose stream its documentation
guarantees, and every picture operation from Pillow; no global state is read, no model's mean or deviation: a view is
uint8, and teacher and student each normalise the same pixels.

Legend: B = batch, S = side of a view.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from tinymim.data.photos import crop_box, to_tensor
from tinymim.data.pixels import open_photo, to_rgb
from tinymim.errors import ConfigError

SEEDS = 2**31  # seeds are below it: an int32, as in TinyViT's published format
FILL = (128, 128, 128)  # where a turned or shifted picture leaves nothing: no model's mean


def view_seed(seed: int, key: str, epoch: int) -> int:
    """The seed, 0 .. 2**31 - 1, of a photo's view in an epoch: whoever computes it gets the same.

    Args:
        seed: Of the store or the run.
        key: The photo's path below the data folder, with ``/``.
        epoch: From 0.
    """
    words = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "little") % SEEDS


def pairs(count: int, seed: int, epoch: int) -> np.ndarray:
    """Which photos are mixed with each other in an epoch: indices (count,); neighbours 2i and 2i + 1 are partners.

    It depends on nothing else, so neither on the batch nor on the number of processes. With an odd count the last one
    has no partner and is not mixed.
    """
    return np.random.default_rng([seed, epoch, 2]).permutation(count)


class Replay:
    """Random crop, flip, RandAugment and erasing of a photo, mixup and cutmix of two, each fixed by a seed.

    Args:
        img_size: S, pixels.
        scale: Share of the photo's area in the random crop (aspect ratio 3/4 to 4/3), resized by Pillow's bicubic.
        flip: Probability of a horizontal flip.
        rand_augment: timm's string, e.g. "m9-n2-mstd0.5-inc1" (:class:`RandAugment`); None or "none": none.
        erasing: Probability that a rectangle (2 to 33 % of the area) becomes noise.
        mixup: Alpha of mixup's Beta distribution; 0: none.
        cutmix: Alpha of cutmix's. With both, a pair has either with probability 1/2.

    Raises:
        ConfigError: a value out of its range.

    Sources: random erasing arXiv 1708.04896 (noise uniform in 0..255), mixup 1710.09412, cutmix 1905.04899; ranges and
    the choice between the two as in timm.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        flip: float = 0.5,
        rand_augment: str | None = None,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        def check(name: str, value: Any, ok: bool, words: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={value!r} of a replayed augmentation", f"it must be {words}", f"use {words}")

        check("img_size", img_size, type(img_size) is int and img_size > 0, "a whole number above 0")
        low_high = isinstance(scale, Sequence) and len(scale) == 2 and all(map(_number, scale))
        check("scale", scale, low_high and 0 < scale[0] <= scale[1] <= 1, "two numbers, 0 < least <= most <= 1")
        for name, value in (("flip", flip), ("erasing", erasing)):
            check(name, value, _number(value) and 0 <= value <= 1, "a probability, 0 to 1")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            check(name, value, _number(value) and 0 <= value <= 1000, "a number from 0")
        self.img_size, self.scale, self.flip, self.erasing = img_size, (float(scale[0]), float(scale[1])), flip, erasing
        self.mixup, self.cutmix = mixup, cutmix
        self.rand_augment = None if rand_augment in (None, "", "none") else RandAugment(rand_augment)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, as JSON values: equal for equal augmentations; ``Replay(**settings)`` is the same one."""
        return {
            "img_size": self.img_size,
            "scale": [*self.scale],
            "flip": float(self.flip),
            "rand_augment": None if self.rand_augment is None else str(self.rand_augment),
            "erasing": float(self.erasing),
            "mixup": float(self.mixup),
            "cutmix": float(self.cutmix),
        }

    @property
    def mixes(self) -> bool:
        """Whether views are mixed, so that a target belongs to two photos."""
        return self.mixup > 0 or self.cutmix > 0

    def view(self, photo: Path | str | Image.Image, seed: int) -> Tensor:
        """The view of a photo that a seed names, before any mixing: uint8 (3, S, S).

        Args:
            photo: The file, or what :func:`~tinymim.data.pixels.open_photo` made of it: upright.
            seed: 0 .. 2**31 - 1.

        Raises:
            UnreadablePhoto: the file is damaged.
        """
        image = to_rgb(photo) if isinstance(photo, Image.Image) else open_photo(photo)
        rng = random.Random(int(seed))
        side = (self.img_size, self.img_size)
        image = image.crop(crop_box(image.size, self.scale, rng)).resize(side, Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            image = self.rand_augment(image, rng)
        view = to_tensor(image)
        if rng.random() < self.erasing:
            _erase(view, rng)
        return view

    def mix(self, views_B3SS: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """Views whose neighbours 2i and 2i + 1 are mixed with each other; an odd last one stays as it is.

        The draws of a pair come from the XOR of its seeds, as TinyViT's do: neither order nor place matters.

        Args:
            views_B3SS: uint8, of :meth:`view`, on any device; not changed.
            seeds: Their B seeds.

        Returns:
            uint8 (B, 3, S, S).
        """
        if not self.mixes:
            return views_B3SS
        mixed = views_B3SS.clone()
        for i in range(0, len(views_B3SS) - 1, 2):
            rng = random.Random(int(seeds[i]) ^ int(seeds[i + 1]))
            one, two = views_B3SS[i], views_B3SS[i + 1]
            cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
            alpha = self.cutmix if cut else self.mixup
            own = rng.betavariate(alpha, alpha)  # share that a view keeps of itself
            if cut:
                rows, columns = _cut(self.img_size, own, rng)
                mixed[i, :, rows, columns] = two[:, rows, columns]
                mixed[i + 1, :, rows, columns] = one[:, rows, columns]
            else:
                weight = round(own * 2**16)  # in whole numbers: the same on every device
                a, b = one.int(), two.int()
                mixed[i] = (a * weight + b * (2**16 - weight) + 2**15) >> 16
                mixed[i + 1] = (b * weight + a * (2**16 - weight) + 2**15) >> 16
        return mixed


class RandAugment:
    """RandAugment (arXiv 1909.13719) as timm reads it, with the draws of one generator.

    Args:
        words: Sections of timm's string, joined by "-"; "rand-" before them may be left out. m: magnitude (10); n:
            operations, one after the other (2); p: probability of each (0.5); mstd: deviation of the magnitude (0),
            above 100 uniform from 0 to m; mmax: its upper bound (10); inc1: operations get stronger with the magnitude.

    Raises:
        ConfigError: another section.
    """

    def __init__(self, words: str) -> None:
        known = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "mmax": 10.0, "inc": 0.0}
        for word in str(words).removeprefix("rand-").split("-"):
            found = re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d+)?)", word)
            if found is None or (found[1] in ("n", "inc") and "." in found[2]):
                raise ConfigError(
                    f"the RandAugment {words!r}",
                    f"{word!r} is none of m, n, p, mstd, mmax, inc with its number",
                    "write e.g. m9-n2-mstd0.5-inc1",
                )
            known[found[1]] = float(found[2])
        if known["p"] > 1 or known["inc"] > 1:
            raise ConfigError(f"the RandAugment {words!r}", "p and inc are at most 1", "write e.g. m9-n2-p0.5-inc1")
        self.known = known

    def __str__(self) -> str:
        """Every section, in one order: equal for equal policies."""
        return "-".join(f"{name}{value:g}" for name, value in self.known.items())

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """An RGB picture, augmented with the draws of ``rng``."""
        m, n, p, mstd, mmax, inc = self.known.values()
        names = [*OPERATIONS]
        for _ in range(int(n)):
            name = names[int(rng.random() * len(names))]
            if rng.random() >= p:
                continue
            magnitude = rng.uniform(0, m) if mstd > 100 else rng.gauss(m, mstd)
            level = min(max(magnitude, 0.0), mmax) / 10
            image = OPERATIONS[name](image, level, -1 if rng.random() < 0.5 else 1, inc > 0)
        return image


def _enhance(kind: Any) -> Callable[[Image.Image, float, int, bool], Image.Image]:
    def enhance(image: Image.Image, level: float, sign: int, inc: bool) -> Image.Image:
        factor = max(0.1, 1 + sign * level * 0.9) if inc else level * 1.8 + 0.1
        changed: Image.Image = kind(image).enhance(factor)
        return changed

    return enhance


def _moved(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Pixel (x, y) of the result is (ax + by + c, dx + ey + f) of the picture."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _solarize_add(image: Image.Image, level: float, sign: int, inc: bool) -> Image.Image:
    add = min(128, int(level * 110))
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _posterize(image: Image.Image, level: float, sign: int, inc: bool) -> Image.Image:
    """Keep the upper bits; 0, which Pillow's own refuses, makes the picture black, as in timm."""
    bits = min(max(4 - int(level * 4) if inc else int(level * 4), 0), 8)
    return image.point([value & -(2 ** (8 - bits)) for value in range(256)] * 3)


def _solarize(image: Image.Image, level: float, sign: int, inc: bool) -> Image.Image:
    threshold = min(256, int(level * 256))
    return ImageOps.solarize(image, 256 - threshold if inc else threshold)


# (picture, magnitude / 10, +1 or -1, inc) -> picture: the fifteen operations of timm's RandAugment, in its order
OPERATIONS: dict[str, Callable[[Image.Image, float, int, bool], Image.Image]] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Rotate": lambda image, level, sign, _: image.rotate(sign * level * 30, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, sign, _: _moved(image, 1, sign * level * 0.3, 0, 0, 1, 0),
    "ShearY": lambda image, level, sign, _: _moved(image, 1, 0, 0, sign * level * 0.3, 1, 0),
    "TranslateXRel": lambda image, level, sign, _: _moved(image, 1, 0, sign * level * 0.45 * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, level, sign, _: _moved(image, 1, 0, 0, 0, 1, sign * level * 0.45 * image.height),
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _erase(view: Tensor, rng: random.Random) -> None:
    """Fill a rectangle with uniform noise, in place: 2 to 33 % of the area, aspect ratio 0.3 to 3.3, ten tries."""
    side = view.shape[-1]
    for _ in range(10):
        area = side * side * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < side and 0 < width < side:
            top, left = rng.randint(0, side - height), rng.randint(0, side - width)
            noise = np.frombuffer(rng.randbytes(3 * height * width), np.uint8).reshape(3, height, width)
            view[:, top : top + height, left : left + width] = torch.from_numpy(noise.copy())
            return


def _cut(side: int, own: float, rng: random.Random) -> tuple[slice, slice]:
    """Rows and columns of a square of the area (1 - own) around a random point, cut at the edges."""
    half = int(side * math.sqrt(1 - own)) // 2
    y, x = int(rng.random() * side), int(rng.random() * side)
    return slice(max(y - half, 0), min(y + half, side)), slice(max(x - half, 0), min(x + half, side))
