"""A teacher and the photos it looks at: views from the data workers, mixed, to the records of a store.

Legend: B = photos of a batch, S = side of a view, C = classes, K = classes that are kept.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from tinymim.data.shards import base
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.files import writable
from tinymim.models.logit_teacher import LogitTeacher, load_logit_teacher
from tinymim.store.layout import Array, SortedKeys, logits_arrays, sorted_keys

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = 2**16  # most that the ids of a record can name
UNREADABLE = -1  # seed of a record whose photo is damaged

Item = tuple[int, int]  # epoch, position of a photo among the sorted keys


class Asked(Protocol):
    """What is kept of a teacher.

    Attributes:
        kind: Of the store.
        name: The teacher's.
        sha256: Of its weights.
        arrays: Of a record: ``seed``, int32, and what :meth:`record` gives.
        about: What the header of the store says besides.
        words: The same in words.
        compare: Name, photos and epochs of a large job that a plan is compared with.
    """

    kind: str
    name: str
    sha256: str
    arrays: Sequence[Array]
    about: Mapping[str, Any]
    words: str
    compare: tuple[str, int, int]

    def to(self, place: str, dtype: torch.dtype) -> None:
        """Go to a device and compute in a type."""

    def record(self, views_B3SS: Tensor) -> Mapping[str, Tensor]:
        """Arrays of a batch of uint8 views: name -> (B, ...).

        Raises:
            CheckFailed: the teacher gives NaN or infinities.
        """

    def differences(self, views_B3SS: Tensor, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """How stored arrays (B, ...) differ from what the teacher says: name -> (B,)."""

    def check_header(self, header: Mapping[str, Any], source: str) -> None:
        """Refuse the store of other targets of the same teacher.

        Raises:
            DataError: it is.
        """

    def verdict(self, found: Mapping[str, Tensor], **limits: float) -> tuple[dict[str, float], str]:
        """Numbers of :meth:`differences` of many records, ``failed`` among them, and a line of words."""


class SparseLogits:
    """The K largest probabilities of a classifier.

    Args:
        teacher: The classifier.
        topk: K.

    Raises:
        ConfigError: more than it has, or more classes than ids.
    """

    kind = "logits"
    compare: tuple[str, int, int] = ("ImageNet-22k", 14_197_122, 90)  # TinyViT's

    def __init__(self, teacher: LogitTeacher, topk: int | None) -> None:
        if teacher.classes > CLASSES:
            raise ConfigError(
                f"{teacher.name} has {teacher.classes:,} classes",
                f"a record holds class ids up to {CLASSES - 1:,}",
                "choose a teacher of fewer classes",
            )
        topk = min(100, teacher.classes) if topk is None else topk
        if topk > teacher.classes:
            why = f"{teacher.name} has {teacher.classes:,} classes"
            raise ConfigError(f"--topk {topk}", why, f"use --topk {teacher.classes} or less")
        self.teacher, self.topk, self.name, self.sha256 = teacher, topk, teacher.name, teacher.sha256
        self.arrays: Sequence[Array] = logits_arrays(topk)
        self.dtype = torch.float32
        self.words = f"the {topk} most probable of {teacher.classes:,} classes of {teacher.name}"
        self.about: Mapping[str, Any] = {
            "topk": topk,
            "classes": teacher.classes,
            **({"class_names": [*teacher.class_names]} if teacher.class_names else {}),
        }

    def to(self, place: str, dtype: torch.dtype) -> None:
        """Go to a device and compute in a type."""
        self.teacher.model.to(place)
        self.dtype = dtype

    def record(self, views_B3SS: Tensor) -> dict[str, Tensor]:
        """Values (B, K) and indices (B, K), most probable first."""
        values_BK, indices_BK = self._look(views_B3SS).topk(self.topk)
        return {"values": values_BK, "indices": indices_BK}

    def differences(self, views_B3SS: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Largest and mean difference of a stored probability, and the share of classes that differ (as sets)."""
        probabilities_BC = self._look(views_B3SS)
        indices_BK, values_BK = stored["indices"].long(), stored["values"].float()
        if int(indices_BK.max()) >= probabilities_BC.shape[1]:
            raise DataError(
                f"the store names the class {int(indices_BK.max())}",
                f"the teacher has {probabilities_BC.shape[1]}",
                "write it anew",
            )
        dp_BK = (probabilities_BC.gather(1, indices_BK) - values_BK).abs()
        top_BK = probabilities_BC.topk(self.topk).indices
        kept_B = (indices_BK[:, :, None] == top_BK[:, None, :]).any(2).float().mean(1)
        return {"max_dp": dp_BK.amax(1), "mean_dp": dp_BK.mean(1), "differing": 1 - kept_B}

    def check_header(self, header: Mapping[str, Any], source: str) -> None:
        """Refuse a store of another K or number of classes."""
        if self.topk != header.get("topk") or self.teacher.classes != header.get("classes"):
            raise DataError(
                f"{source} is of other classes", f"K is {header.get('topk')}", "give the store's own teacher"
            )

    def verdict(self, found: Mapping[str, Tensor], **limits: float) -> tuple[dict[str, float], str]:
        """See :class:`Asked`; limits: ``max_dp`` and ``max_differing``."""
        max_dp, max_differing = limits["max_dp"], limits["max_differing"]
        numbers = {
            "max_dp": float(found["max_dp"].max()),
            "mean_dp": float(found["mean_dp"].mean()),
            "differing": float(found["differing"].mean()),
        }
        words = (
            f"largest |dp| {numbers['max_dp']:.2g}, mean {numbers['mean_dp']:.2g}, differing classes "
            f"{numbers['differing']:.2%}; at most {max_dp:g} and {max_differing:.0%} are allowed"
        )
        failed = numbers["max_dp"] > max_dp or numbers["differing"] > max_differing
        return numbers | {"failed": float(failed)}, words

    def _look(self, views_B3SS: Tensor) -> Tensor:
        """Probabilities (B, C)."""
        probabilities_BC = self.teacher.probabilities(views_B3SS, self.dtype)
        if not bool(probabilities_BC.isfinite().all()):
            low = self.dtype != torch.float32
            raise CheckFailed(
                f"{self.name} gives NaN or infinities",
                f"it computes in {self.dtype}" if low else "its weights may be damaged",
                "use --amp bf16, or leave --amp out" if low else "check the file of its weights",
            )
        return probabilities_BC


@dataclass(kw_only=True)
class Job:
    """Photos, their augmentation and a teacher: what ``tinymim cache`` was given.

    Attributes:
        photos: Files, in the order of their keys.
        keys: Their paths below the data folder.
        encoded: The same as a store holds them.
        replay: The augmentation.
        asked: The teacher, and what is kept of it.
        batch_size: B.
        workers: Data-loading processes.
        device: "cpu" or "cuda".
        precision: One of :data:`PRECISIONS`.
        seed: Of all views.
        waited: Seconds that the last batch was waited for.
    """

    photos: Sequence[Path]
    keys: Sequence[str]
    encoded: SortedKeys
    replay: Replay
    asked: Asked
    batch_size: int
    workers: int
    device: str
    precision: str
    seed: int
    waited: float = 0.0

    def records(self, batches: Iterator[list[Item]]) -> Iterator[dict[str, np.ndarray]]:
        """The records of batches: seed (B,), and the arrays of :attr:`asked`.

        Raises:
            CheckFailed: the teacher gives NaN or infinities.
            DataError: a damaged photo that is to be mixed with another.
        """
        asked = time.monotonic()
        for views_B3SS, seeds_B in self._views(batches, Seeds(self.seed)):
            self.waited = time.monotonic() - asked
            found = self.asked.record(self._mix(views_B3SS, seeds_B))
            record = {"seed": seeds_B.numpy(), **{name: value.cpu().numpy() for name, value in found.items()}}
            for value in record.values():
                if value.dtype.kind == "f":
                    value[record["seed"] == UNREADABLE] = 0
            yield record
            asked = time.monotonic()

    def differences(
        self, batches: Iterator[list[Item]], stored: Mapping[Item, Mapping[str, Any]]
    ) -> Iterator[dict[str, Tensor]]:
        """For batches of stored records, how they differ from what the teacher says now: name -> (B,)."""
        now: list[list[Item]] = []

        def noted() -> Iterator[list[Item]]:
            for items in batches:
                now.append(items)
                yield items

        seeds = Seeds(0, {item: int(record["seed"]) for item, record in stored.items()})
        for views_B3SS, seeds_B in self._views(noted(), seeds):
            records = [stored[item] for item in now.pop(0)]
            arrays = {name: np.stack([r[name] for r in records]) for name in records[0] if name != "seed"}
            given = {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}
            found = self.asked.differences(self._mix(views_B3SS, seeds_B), given)
            yield {name: value.cpu() for name, value in found.items()}

    def _views(self, batches: Iterator[list[Item]], seeds: "Seeds") -> DataLoader:
        return DataLoader(
            _Views(self.photos, self.keys, self.replay, seeds),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device == "cuda",
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def _mix(self, views_B3SS: Tensor, seeds_B: Tensor) -> Tensor:
        """A batch on the device, its pairs mixed."""
        if self.replay.mixes and (seeds_B == UNREADABLE).any():
            raise DataError(
                "a damaged photo cannot be mixed with another",
                "the targets of its partner would mean nothing",
                "remove damaged photos (tinymim data --pack names them), or leave --mixup and --cutmix out",
            )
        return self.replay.mix(views_B3SS.to(self.device, non_blocking=True), seeds_B)


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
    asked: Callable[[], Asked],
    *,
    data: str | Path,
    augmentation: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> Job:
    """Check what a command was given, list the photos, load the teacher; nothing is written.

    Args:
        asked: Loads the teacher, when all else was checked.
        data: The photos.
        augmentation: Keywords of :class:`~tinymim.data.replay.Replay`.
        seed, batch_size, workers, device, precision: See :class:`Job`; None: chosen.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}", "it must be at least 1", "e.g. --batch-size 64")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"--seed {seed}", "it must be from 0 to below 2^31", "e.g. --seed 0")
    replay = Replay(**(augmentation or {}))
    if replay.mixes and batch_size % 2:
        why = "neighbours of a batch are mixed with each other"
        raise ConfigError(f"--batch-size {batch_size}", why, f"e.g. --batch-size {batch_size + 1}")
    place = use_device(device)
    names = photo_names(data, list_photos(data))
    by_key = {key: path for path, key in names.items()}
    encoded = sorted_keys(names.values())
    keys = [key.decode("utf-8", "surrogateescape") for key in encoded]
    given = asked()
    given.to(place, PRECISIONS[precision])
    free = min(limit for name, limit in core_limits().items() if name != "OMP_NUM_THREADS")
    return Job(
        photos=[by_key[key] for key in keys],
        keys=keys,
        encoded=encoded,
        replay=replay,
        asked=given,
        batch_size=batch_size,
        workers=min(max(int(free) - 1, 1), 16) if workers is None else workers,
        device=place,
        precision=precision,
        seed=seed,
    )


def sparse_logits(
    teacher: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    topk: int | None = None,
    pretrained: bool = True,
) -> SparseLogits:
    """Load a classifier whose probabilities are kept; arguments of :func:`load_logit_teacher`.

    Raises:
        ConfigError, CheckpointError: what is wrong.
    """
    if topk is not None and topk < 1:
        raise ConfigError(f"--topk {topk}", "it must be at least 1", "e.g. --topk 64")
    return SparseLogits(load_logit_teacher(teacher, weights=weights, pretrained=pretrained), topk)


def about(job: Job, data: str | Path) -> dict[str, Any]:
    """What the header of the store says about a job."""
    return {
        "teacher": {"name": job.asked.name, "sha256": job.asked.sha256},
        **job.asked.about,
        "augmentation": job.replay.settings,
        "precision": job.precision,
        "data": {"folder": writable(base(data).resolve().name)},
    }
