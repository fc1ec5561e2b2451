"""Photo folders for pre-training: one crop for teacher and student; (seed, epoch, index) fixes all random numbers.

No state is kept between photos, so a run that is killed and resumed sees exactly the same pixels.
"""

import math
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tinymim.data.jitter import CHANGES, draw_jitter
from tinymim.data.photo_files import list_photos
from tinymim.data.pixels import Box, UnreadablePhoto, open_crop, open_photo
from tinymim.errors import DataError

Value = TypeVar("Value")
__all__ = [
    "Photos",
    "StepSampler",
    "center_box",
    "collate",
    "collate_readable",
    "color_jitter",
    "crop_box",
    "leave_signals_to_the_main_process",
    "list_photos",
    "open_near",
    "random_crop",
    "read_photo",
    "student_copy",
    "to_tensor",
]


def crop_box(size: tuple[int, int], scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a random resized crop, in pixels: share of the area in ``scale``, aspect ratio
    3/4 to 4/3.

    The rule of torchvision's RandomResizedCrop: ten tries, then the largest central box of an allowed ratio.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, changes: Sequence[tuple[str, float]]) -> Image.Image:
    """Change the colours of a photo as :func:`tinymim.data.jitter.draw_jitter` says."""
    for change, factor in changes:
        image = getattr(ImageEnhance, change)(image).enhance(factor)
    return image


def student_copy(
    image: Image.Image | Tensor, changes: Sequence[tuple[str, float]], *, later: bool
) -> dict[str, Tensor]:
    """The student's copy of a view with changed colours, ``student_image``; with ``later`` what it is made by on the
    device, ``jitter`` (3, 2).
    """
    if later:
        return {"jitter": torch.tensor([(CHANGES.index(change), factor) for change, factor in changes])}
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return {"student_image": to_tensor(color_jitter(image, changes))}


def center_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of the largest central square, in pixels."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def read_photo(path: str | Path) -> Image.Image | None:
    """A photo as RGB, upright; None if it is damaged."""
    try:
        return open_photo(path)
    except UnreadablePhoto:
        return None


def random_crop(path: Path, side: int, scale: tuple[float, float], rng: random.Random) -> Image.Image | None:
    """A :func:`crop_box` of a photo as a square of ``side`` pixels, decoded no finer than needed; None: damaged."""
    try:
        return resize(open_crop(path, lambda size: crop_box(size, scale, rng), side), (side, side))
    except UnreadablePhoto:
        return None


def open_near(photos: Sequence[Path], index: int, read: Callable[[Path], Value | None]) -> tuple[Value, int, list[str]]:
    """Open a photo, or the next one that is readable.

    Args:
        photos: Files.
        index: Which one.
        read: Opens a file; None if it is damaged.

    Returns:
        What ``read`` gave, its index, and the files that were skipped.

    Raises:
        DataError: none can be read.
    """
    skipped: list[str] = []
    for step in range(len(photos)):
        at = (index + step) % len(photos)
        image = read(photos[at])
        if image is not None:
            return image, at, skipped
        skipped.append(str(photos[at]))
    raise DataError("no photo can be read", f"all {len(photos)} files are damaged", "check the folder")


class Photos(Dataset[dict[str, Any]]):
    """Crops of photos, as uint8.

    Args:
        photos: Files.
        img_size: Side of the crop, pixels.
        scale: Area share of the random crop.
        jitter: Strength of the colour jitter on the student's copy; None for one view only (MAE).
        seed: Fixes, with epoch and index, all random numbers.
        train: False: central square, no flip, no jitter.
        extra: (photo, epoch) -> tensors that the method needs besides the pixels; None: none. Called in the data
            workers; for a damaged photo, with the one that replaces it.
        decode: "whole": Pillow decodes the photo and resizes the crop. "crop": a JPEG is decoded at 1/2, 1/4 or 1/8 of
            its size where that leaves ``img_size`` pixels, and PyTorch resizes the crop (uint8, antialiased).
        jitter_later: Leave the jitter to the model: instead of the student's copy, what it is made by.

    The key of an item is ``(epoch, index)``, the item ``{"image": (3, S, S) uint8, "student_image": same or absent,
    "skipped": list of files}`` plus the tensors of ``extra``; with ``jitter_later`` ``"jitter"`` (3, 2) of
    :func:`~tinymim.data.jitter.draw_jitter` instead of ``"student_image"``. An unreadable photo is replaced by the next
    one, and its path is in ``skipped``.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        *,
        img_size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: float | None = None,
        seed: int = 0,
        train: bool = True,
        extra: Callable[[Path, int], Mapping[str, Tensor]] | None = None,
        decode: str = "whole",
        jitter_later: bool = False,
    ) -> None:
        self.photos, self.img_size, self.scale = list(photos), img_size, scale
        self.jitter, self.seed, self.train, self.extra = jitter, seed, train, extra
        self.decode, self.jitter_later = decode, jitter_later

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        (image, rng), at, skipped = open_near(self.photos, index, lambda path: self._view(path, epoch, index))
        sample: dict[str, Any] = {"image": to_tensor(image), "skipped": skipped}
        if self.jitter is not None and self.train:
            sample |= student_copy(image, draw_jitter(self.jitter, rng), later=self.jitter_later)
        elif self.jitter is not None:
            sample["student_image"] = sample["image"]
        if self.extra is not None:
            sample |= self.extra(self.photos[at], epoch)
        return sample

    def _view(self, path: Path, epoch: int, index: int) -> tuple[Image.Image, random.Random] | None:
        """The crop of a photo, and the generator that drew it; None if the photo is damaged."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")  # anew for a photo that replaces a damaged one

        def choose(size: tuple[int, int]) -> Box:
            return crop_box(size, self.scale, rng) if self.train else center_box(size)

        side = (self.img_size, self.img_size)
        try:
            if self.decode == "whole":
                image = open_photo(path)
                image = image.resize(side, Image.Resampling.BICUBIC, box=choose(image.size))
            else:
                image = resize(open_crop(path, choose, self.img_size), side)
        except UnreadablePhoto:
            return None
        if self.train and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image, rng


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB image to (width, height): bicubic and antialiased, within rounding Pillow's result, in less time.

    PyTorch has a vectorised form for uint8 where the colours of a pixel are next to each other in memory.
    """
    if image.size == size:
        return image
    pixels_1HW3 = torch.from_numpy(np.array(image))[None]
    resized = F.interpolate(pixels_1HW3.permute(0, 3, 1, 2), size[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack views and labels: name -> (B, ...); join the lists of skipped files."""
    batch: dict[str, Any] = {key: torch.stack([s[key] for s in samples]) for key in samples[0] if key != "skipped"}
    batch["skipped"] = [path for s in samples for path in s["skipped"]]
    return batch


def collate_readable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """:func:`collate` for scoring: damaged photos are left out and listed in ``skipped``, which may be the only key."""
    readable = [s for s in samples if not s["skipped"]]
    batch = collate(readable) if readable else {}
    return {**batch, "skipped": [s["skipped"][0] for s in samples if s["skipped"]]}


def leave_signals_to_the_main_process(worker: int) -> None:
    """Make a data worker ignore Ctrl-C and SIGTERM: the main process ends its step, saves, and then stops it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process, starting at any step without reading earlier batches.

    Args:
        num_photos: Photos in the dataset.
        batch_size: Global batch; the last incomplete batch of an epoch is dropped.
        steps: Optimizer steps in all.
        seed: Fixes the order.
        start: First step (resume).
        rank: Number of this process.
        world: Number of processes.
        order: Epoch -> order of the photos; None: shuffled.
    """

    def __init__(
        self,
        num_photos: int,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.num_photos, self.batch_size, self.steps, self.order = num_photos, batch_size, steps, order
        self.seed, self.start, self.rank, self.world = seed, start, rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.num_photos // self.batch_size
        own = self.batch_size // self.world
        epoch, order = -1, np.empty(0, int)
        for step in range(self.start, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                shuffled = np.random.default_rng([self.seed, epoch]).permutation
                order = shuffled(self.num_photos) if self.order is None else self.order(epoch)
            first = step % per_epoch * self.batch_size + self.rank * own
            yield [(epoch, int(i)) for i in order[first : first + own]]
