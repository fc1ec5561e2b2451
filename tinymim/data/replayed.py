"""Photos whose views are made from seeds: those that a store of targets holds, or those that the run's seed gives.

Legend: B = batch, S = side of a view.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tinymim.data.jitter import draw_jitter
from tinymim.data.photos import collate, open_near, student_copy
from tinymim.data.pixels import UnreadablePhoto
from tinymim.data.replay import Replay, pairs, view_seed
from tinymim.errors import DataError


class Targets(Protocol):
    """What was stored of the photos.

    Attributes:
        seed: Fixes which photos are mixed with each other (:func:`tinymim.data.replay.pairs`).
    """

    seed: int

    def __call__(self, key: str, epoch: int) -> tuple[int, Mapping[str, Tensor]] | None:
        """The seed of a photo's view in an epoch, and its targets; None: the photo was damaged."""


class ReplayedPhotos(Dataset[dict[str, Any]]):
    """Views of photos, as uint8, mixed in pairs where the augmentation mixes.

    Args:
        photos: Files.
        keys: File -> its key, the path below the data folder.
        replay: The augmentation.
        stored: Seeds and targets; None: the seeds of :func:`tinymim.data.replay.view_seed`, and no targets.
        seed: Of the run: the order of the photos, the jitter, and without ``stored`` the views.
        jitter: Strength of a colour jitter on the student's copy, which the targets know nothing of; None: one view.
        jitter_later: See :class:`tinymim.data.photos.Photos`.

    The key of an item is ``(epoch, index)``, the item ``{"image": (3, S, S) uint8, "seed": whole number, "skipped":
    files}``, with ``jitter`` also ``"student_image"`` or ``"jitter"``, plus the targets; :meth:`collate` makes a batch
    and mixes. A photo that is unreadable, or was when the targets were stored, is replaced by the next one, and its
    path is in ``skipped``.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        keys: Mapping[Path, str],
        replay: Replay,
        stored: Targets | None = None,
        *,
        seed: int = 0,
        jitter: float | None = None,
        jitter_later: bool = False,
    ) -> None:
        self.jitter, self.jitter_later = jitter, jitter_later
        self.photos, self.keys, self.replay, self.stored, self.seed = list(photos), keys, replay, stored, seed
        names = [keys[photo].encode("utf-8", "surrogateescape") for photo in self.photos] if replay.mixes else []
        self._sorted = np.array(sorted(range(len(names)), key=names.__getitem__), int)  # pairs are of sorted keys

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        item, _, skipped = open_near(self.photos, index, lambda path: self._read(path, epoch))
        if skipped and self.replay.mixes:
            raise DataError(
                f"{skipped[0]} cannot be read",
                "the photo that it would be mixed with has no meaning without it",
                "remove or replace it, or train without mixing: --cfg-options mixup=0 cutmix=0",
            )
        return {**item, "skipped": skipped}

    def _read(self, path: Path, epoch: int) -> dict[str, Any] | None:
        """The view of a photo and its targets; None if it is damaged."""
        name = self.keys[path]
        found = (view_seed(self.seed, name, epoch), {}) if self.stored is None else self.stored(name, epoch)
        if found is None:
            return None
        try:
            view = self.replay.view(path, found[0])
        except UnreadablePhoto:
            return None
        own: dict[str, Tensor] = {}
        if self.jitter is not None:
            rng = random.Random(f"{self.seed}/{epoch}/{name}")
            own = student_copy(view, draw_jitter(self.jitter, rng), later=self.jitter_later)
        return {"image": view, **own, "seed": found[0], **found[1]}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: views (B, 3, S, S), neighbours 2i and 2i + 1 mixed, and targets (B, ...)."""
        seeds = [sample["seed"] for sample in samples]
        batch = collate([{name: value for name, value in sample.items() if name != "seed"} for sample in samples])
        batch["image"] = self.replay.mix(batch["image"], seeds)
        return batch

    def order(self, epoch: int) -> np.ndarray:
        """The photos of an epoch in the order of training: shuffled; where views are mixed, pair by pair."""
        count = len(self.photos)
        rng = np.random.default_rng([self.seed, epoch])
        if not self.replay.mixes:
            return rng.permutation(count)
        partners = self._sorted[pairs(count, self.seed if self.stored is None else self.stored.seed, epoch)]
        whole = count // 2
        shuffled = partners[: 2 * whole].reshape(whole, 2)[rng.permutation(whole)].reshape(-1)
        return np.concatenate([shuffled, partners[2 * whole :]])
