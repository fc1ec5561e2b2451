"""Training pairs: a template and a later search crop of one sequence; (seed, epoch, index) fixes all random numbers."""

import math
import random
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset

from tinymim.data.photos import to_tensor
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.errors import DataError
from tinymim.track.boxes import Square, centres, square_around
from tinymim.track.sequences import Sequence

TRIES = 20  # damaged frames in a row


class Pairs(Dataset[dict[str, Any]]):
    """Pairs of crops, uint8, and where the target is in the second.

    A sequence is drawn, two of its frames with the target at most ``gap`` apart, in their order. The search crop is not
    where the target is: its centre is shifted and its scale changed, as a tracker's last box would be off. Both crops
    are flipped, made grey and changed in light together. Numbers as published (OSTrack).

    Args:
        sequences: The sequences.
        samples: Pairs of an epoch.
        sizes: Sides of template and search crop, pixels.
        factors: Of :class:`~tinymim.track.network.Tracker`.
        gap: Most frames between the two.
        shift: Largest shift of the search crop's centre, each way, in roots of the target's area; half of the published
            "centre jitter" 3.
        scale: Standard deviation of the logarithm of its scale.
        seed: Of all random numbers.
        train: False: no flip, no change of colours, and the epoch does not matter.

    The key of an item is ``(epoch, index)``, the item ``{"image": search crop (3, S, S) uint8, "template": (3, T, T)
    uint8, "box": (4,) centre x, y, width, height as fractions of the search crop, "skipped": damaged frames}``.
    """

    def __init__(
        self,
        sequences: Many[Sequence],
        *,
        samples: int,
        sizes: tuple[int, int],
        factors: tuple[float, float] = (2.0, 4.0),
        gap: int = 200,
        shift: float = 1.5,
        scale: float = 0.5,
        seed: int = 0,
        train: bool = True,
    ) -> None:
        self.sequences, self.samples, self.sizes, self.factors = list(sequences), samples, sizes, factors
        self.gap, self.shift, self.scale, self.seed, self.train = gap, shift, scale, seed, train
        self.visible = [np.flatnonzero(each.visible) for each in self.sequences]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        rng, skipped = random.Random(f"{self.seed}/{epoch if self.train else -1}/{index}"), list[str]()
        while len(skipped) < TRIES:
            found = self._pair(rng, skipped)
            if found is not None:
                (template, search), box_4 = found
                item = {"image": to_tensor(search), "template": to_tensor(template), "skipped": skipped}
                return {**item, "box": torch.from_numpy(box_4.astype(np.float32))}
        raise DataError(f"{TRIES} frames in a row cannot be read", f"e.g. {skipped[0]} is damaged", "check --data")

    def _pair(self, rng: random.Random, skipped: list[str]) -> tuple[list[Image.Image], np.ndarray] | None:
        """Crops and box; None: a frame is damaged, which is noted."""
        number = rng.randrange(len(self.sequences))
        sequence, visible = self.sequences[number], self.visible[number]
        first = rng.choice(visible)
        later = visible[(visible >= first) & (visible <= first + self.gap)]
        second = rng.choice(later)
        old, new = sequence.truth[first], sequence.truth[second]
        squares = (square_around(old, self.factors[0]), self._search(new, rng))
        crops = []
        for at, square, side in zip((first, second), squares, self.sizes, strict=True):
            try:
                crops.append(square.cut(open_photo(sequence.frames[at]), side))
            except UnreadablePhoto:
                skipped.append(str(sequence.frames[at]))
                return None
        box = squares[1].to_crop(new)
        if self.train and rng.random() < 0.5:
            crops, box[0] = [ImageOps.mirror(crop) for crop in crops], 1 - box[0]
        if self.train:
            grey, light = rng.random() < 0.05, rng.uniform(0.8, 1.2)
            crops = [ImageOps.grayscale(crop).convert("RGB") if grey else crop for crop in crops]
            crops = [ImageEnhance.Brightness(crop).enhance(light) for crop in crops]
        return crops, box

    def _search(self, box: np.ndarray, rng: random.Random) -> Square:
        """The search square around a shifted and scaled box."""
        sides = box[2:] * [math.exp(self.scale * max(min(rng.gauss(0, 1), 2), -2)) for _ in range(2)]
        reach = self.shift * math.sqrt(sides[0] * sides[1])
        centre = centres(box) + [rng.uniform(-reach, reach) for _ in range(2)]
        return square_around(np.concatenate([centre - sides / 2, sides]), self.factors[1])
