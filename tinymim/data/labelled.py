"""Labelled photos for fine-tuning with timm's augmentation; (seed, epoch, index) fixes all random numbers."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tinymim.data.photos import open_near, random_crop, read_photo


@contextmanager
def fixed_draws(*key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators from ``key`` inside the block; restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    start = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(start)
    np.random.seed(start)
    torch.manual_seed(start)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class LabelledPhotos(Dataset[dict[str, Any]]):
    """Photos with their class ids.

    Args:
        photos: Files.
        labels: One class id per photo.
        transform: RGB image -> normalised tensor (3, S, S), e.g. from ``timm.data.create_transform``.
        seed: Fixes, with epoch and index, all random numbers.
        crop: Side in pixels and area share of a random crop, which the transform takes in place of the photo; a JPEG
            is decoded no finer than that needs (:func:`~tinymim.data.pixels.open_crop`). None: it takes the photo.

    The key of an item is ``(epoch, index)``, the item ``{"image": (3, S, S) float32, "label": (), "skipped": files}``.
    An unreadable photo is replaced by the next one, with its label, and its path is in ``skipped``.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        labels: Sequence[int] | np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        crop: tuple[int, tuple[float, float]] | None = None,
    ) -> None:
        self.photos, self.labels, self.transform, self.seed = list(photos), list(labels), transform, seed
        self.crop = crop

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        image, at, skipped = open_near(self.photos, index, lambda path: self._read(path, epoch, index))
        with fixed_draws(self.seed, epoch, index):
            view = self.transform(image)
        return {"image": view, "label": torch.tensor(int(self.labels[at])), "skipped": skipped}

    def _read(self, path: Path, epoch: int, index: int) -> Image.Image | None:
        """What the transform takes; None if the photo is damaged."""
        if self.crop is None:
            return read_photo(path)
        return random_crop(path, *self.crop, random.Random(f"{self.seed}/{epoch}/{index}"))
