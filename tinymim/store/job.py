"""A teacher and the photos it looks at: views from the data workers, mixed and normalised, to probabilities.

Legend: B = photos of a batch, S = side of a view, C = classes, K = classes that are kept.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinymim.compat import use_device
from tinymim.cores import core_limits
from tinymim.data.photo_files import list_photos, photo_names
from tinymim.data.photos import leave_signals_to_the_main_process
from tinymim.data.pixels import UnreadablePhoto
from tinymim.data.replay import Replay, view_seed
from tinymim.data.shards import base, file_bytes
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.files import describe_files
from tinymim.models.logit_teacher import LogitTeacher, load_logit_teacher
from tinymim.store.layout import sorted_keys

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = 2**16  # most that the ids of a record can name
UNREADABLE = -1  # seed of a record whose photo is damaged

Item = tuple[int, int]  # epoch, position of a photo among the sorted keys


@dataclass(kw_only=True)
class Job:
    """Photos, their augmentation and a teacher: what ``tinymim cache`` was given.

    Attributes:
        photos: Files, in the order of their keys.
        keys: Their paths below the data folder.
        replay: The augmentation.
        teacher: On its device.
        topk: K.
        batch_size: B.
        workers: Data-loading processes.
        device: "cpu" or "cuda".
        precision: One of :data:`PRECISIONS`.
        seed: Of all views.
        waited: Seconds that the last batch was waited for.
    """

    photos: Sequence[Path]
    keys: Sequence[str]
    replay: Replay
    teacher: LogitTeacher
    topk: int
    batch_size: int
    workers: int
    device: str
    precision: str
    seed: int
    waited: float = 0.0

    def records(self, batches: Iterator[list[Item]], seeds: "Seeds | None" = None) -> Iterator[dict[str, np.ndarray]]:
        """The records of batches: seed (B,), values (B, K) and indices (B, K), most probable first.

        Raises:
            CheckFailed: the teacher gives NaN or infinities.
            DataError: a damaged photo that is to be mixed with another.
        """
        asked = time.monotonic()
        for views_B3SS, seeds_B in self._views(batches, seeds):
            self.waited = time.monotonic() - asked
            probabilities_BC = self._look(views_B3SS, seeds_B)
            values_BK, indices_BK = (each.cpu() for each in probabilities_BC.topk(self.topk))
            record = {"seed": seeds_B.numpy(), "values": values_BK.numpy(), "indices": indices_BK.numpy()}
            record["values"][record["seed"] == UNREADABLE] = 0
            yield record
            asked = time.monotonic()

    def probabilities(self, batches: Iterator[list[Item]], seeds: "Seeds") -> Iterator[Tensor]:
        """(B, C) of views with given seeds."""
        for views_B3SS, seeds_B in self._views(batches, seeds):
            yield self._look(views_B3SS, seeds_B).cpu()

    def _views(self, batches: Iterator[list[Item]], seeds: "Seeds | None") -> DataLoader:
        return DataLoader(
            _Views(self.photos, self.keys, self.replay, seeds or Seeds(self.seed)),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device == "cuda",
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def _look(self, views_B3SS: Tensor, seeds_B: Tensor) -> Tensor:
        """Probabilities (B, C) of a batch, its pairs mixed."""
        if self.replay.mixes and (seeds_B == UNREADABLE).any():
            raise DataError(
                "a damaged photo cannot be mixed with another",
                "the targets of its partner would mean nothing",
                "remove damaged photos (tinymim data --pack names them), or leave --mixup and --cutmix out",
            )
        views_B3SS = self.replay.mix(views_B3SS.to(self.device, non_blocking=True), seeds_B)
        probabilities_BC = self.teacher.probabilities(views_B3SS, PRECISIONS[self.precision])
        if not bool(probabilities_BC.isfinite().all()):
            raise CheckFailed(
                f"{self.teacher.name} gives NaN or infinities",
                f"it computes in {self.precision}" if self.precision != "fp32" else "its weights may be damaged",
                "use --amp bf16, or leave --amp out" if self.precision != "fp32" else "check the file of its weights",
            )
        return probabilities_BC


class Seeds:
    """The seed of a view: drawn from the store's, or those that a store holds."""

    def __init__(self, seed: int, stored: Mapping[Item, int] | None = None) -> None:
        self.seed, self.stored = seed, stored

    def __call__(self, key: str, item: Item) -> int:
        return view_seed(self.seed, key, item[0]) if self.stored is None else self.stored[item]


class _Views(Dataset[tuple[Tensor, int]]):
    """(epoch, position) -> a view, uint8 (3, S, S), and its seed; of a damaged photo grey and :data:`UNREADABLE`."""

    def __init__(self, photos: Sequence[Path], keys: Sequence[str], replay: Replay, seeds: Seeds) -> None:
        self.photos, self.keys, self.replay, self.seeds = photos, keys, replay, seeds

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        seed = self.seeds(self.keys[item[1]], item)
        try:
            return self.replay.view(self.photos[item[1]], seed), seed
        except UnreadablePhoto:
            return torch.full((3, self.replay.img_size, self.replay.img_size), 128, dtype=torch.uint8), UNREADABLE


def _collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    views, seeds = zip(*samples, strict=True)
    return torch.stack(views), torch.tensor(seeds, dtype=torch.int64)


def open_job(
    *,
    teacher: str,
    data: str | Path,
    teacher_weights: str | os.PathLike[str] | None = None,
    topk: int | None = None,
    augmentation: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    pretrained: bool = True,
) -> Job:
    """Check what a command was given, list the photos, load the teacher; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong.
    """
    for name, number in (("--topk", topk), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number}", "it must be at least 1", f"e.g. {name} 64")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"--seed {seed}", "it must be from 0 to below 2^31", "e.g. --seed 0")
    replay = Replay(**(augmentation or {}))
    if replay.mixes and batch_size % 2:
        why = "neighbours of a batch are mixed with each other"
        raise ConfigError(f"--batch-size {batch_size}", why, f"e.g. --batch-size {batch_size + 1}")
    place = use_device(device)
    names = photo_names(data, list_photos(data))
    by_key = {key: path for path, key in names.items()}
    keys = [key.decode("utf-8", "surrogateescape") for key in sorted_keys(names.values())]
    model = load_logit_teacher(teacher, weights=teacher_weights, pretrained=pretrained)
    if model.classes > CLASSES:
        raise ConfigError(
            f"{model.name} has {model.classes:,} classes",
            f"a record holds class ids up to {CLASSES - 1:,}",
            "choose a teacher of fewer classes",
        )
    topk = min(100, model.classes) if topk is None else topk
    if topk > model.classes:
        why = f"{model.name} has {model.classes:,} classes"
        raise ConfigError(f"--topk {topk}", why, f"use --topk {model.classes} or less")
    model.model.to(place)
    free = min(limit for name, limit in core_limits().items() if name != "OMP_NUM_THREADS")
    return Job(
        photos=[by_key[key] for key in keys],
        keys=keys,
        replay=replay,
        teacher=model,
        topk=topk,
        batch_size=batch_size,
        workers=min(max(int(free) - 1, 1), 16) if workers is None else workers,
        device=place,
        precision=precision,
        seed=seed,
    )


def about(job: Job, data: str | Path) -> dict[str, Any]:
    """What the header of the store says about a job."""
    return {
        "teacher": {"name": job.teacher.name, "sha256": job.teacher.sha256},
        "topk": job.topk,
        "classes": job.teacher.classes,
        **({"class_names": [*job.teacher.class_names]} if job.teacher.class_names else {}),
        "augmentation": job.replay.settings,
        "precision": job.precision,
        "data": describe_files(base(data), job.photos, file_bytes),
    }
