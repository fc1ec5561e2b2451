"""``tinymim cache``: a teacher looks once at every photo in every epoch, and its largest probabilities are kept.

Legend: B = photos of a batch, S = side of a view, C = classes, K = classes that are kept, R = records of a chunk.
"""

import math
import os
import time
from collections import deque
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
from tinymim.progress import Progress, clock
from tinymim.store.layout import Chunk, Layout, logits_arrays, sorted_keys
from tinymim.store.places import open_place
from tinymim.store.targets import TargetStore, missing_chunks
from tinymim.store.writer import TargetWriter, make_header

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = 2**16  # most that the ids of a record can name
IMAGENET_22K = (14_197_122, 90)  # photos; epochs of TinyViT's distillation
UNREADABLE = -1  # seed of a record whose photo is damaged
TIMED = 8.0  # seconds a plan takes to time the teacher, about

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

    def records(self, batches: Iterator[list[Item]], seeds: "Seeds | None" = None) -> Iterator[dict[str, np.ndarray]]:
        """The records of batches: seed (B,), values (B, K) and indices (B, K), most probable first.

        Raises:
            CheckFailed: the teacher gives NaN or infinities.
            DataError: a damaged photo that is to be mixed with another.
        """
        for views_B3SS, seeds_B in self._views(batches, seeds):
            probabilities_BC = self._look(views_B3SS, seeds_B)
            values_BK, indices_BK = (each.cpu() for each in probabilities_BC.topk(self.topk))
            record = {"seed": seeds_B.numpy(), "values": values_BK.numpy(), "indices": indices_BK.numpy()}
            record["values"][record["seed"] == UNREADABLE] = 0
            yield record

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
    topk: int = 100,
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
        if number < 1:
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
        "augmentation": job.replay.settings,
        "precision": job.precision,
        "data": describe_files(base(data), job.photos, file_bytes),
    }


@dataclass
class Plan:
    """What a store will take.

    Attributes:
        records: In all.
        record_bytes: Bytes of one.
        keys_bytes: Bytes of the index.
        missing: Records not written yet.
        free: Bytes that the disk has left; None: unknown.
        rate: Photos per second of this machine; None: not timed.
        words: The first lines to print.
    """

    records: int
    record_bytes: int
    keys_bytes: int
    missing: int
    free: int | None
    rate: float | None
    words: str

    def print(self) -> None:
        """GiB, hours, and the same for ImageNet-22k."""
        print(self.words)
        size = self.records * self.record_bytes + self.keys_bytes
        room = "" if self.free is None else f"; free: {_gib(self.free)}"
        print(f"size:    {_gib(size)}: {self.record_bytes} bytes a view, {_gib(self.keys_bytes)} of keys{room}")
        if self.missing < self.records:
            print(
                f"there:   {self.records - self.missing:,} records; {_gib(self.missing * self.record_bytes)} to write"
            )
        if self.rate:
            print(
                f"speed:   {self.rate:.1f} images/s on this machine: {_hours(self.missing / self.rate)} for what is missing"
            )
        photos, epochs = IMAGENET_22K
        hours = f", {_hours(photos * epochs / self.rate)} on one such machine" if self.rate else ""
        print(
            f"compare: ImageNet-22k ({photos:,} photos, {epochs} epochs) at this K: "
            f"{_gib(photos * epochs * self.record_bytes)}{hours}",
            flush=True,
        )

    def check_room(self, out: str) -> None:
        """Refuse a disk that is too small.

        Raises:
            ConfigError: it is.
        """
        needed = self.missing * self.record_bytes + self.keys_bytes
        if self.free is not None and needed > self.free:
            raise ConfigError(
                f"the disk of {out} is too small",
                f"{_gib(needed)} are to be written, {_gib(self.free)} are free",
                "choose another --out, or a smaller --topk or --epochs",
            )


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**27 else f"{number / 2**20:,.2f} MiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else clock(seconds)


def make_plan(
    job: Job, out: str | os.PathLike[str], data: str | Path, *, epochs: int, chunk: int | None, timed: bool
) -> Plan:
    """What a store takes; with ``timed`` the speed of a few batches. Nothing is written.

    Raises:
        ConfigError: the store at ``out`` is another one.
    """
    arrays, encoded = logits_arrays(job.topk), [key.encode("utf-8", "surrogateescape") for key in job.keys]
    header = make_header(
        encoded, arrays, kind="logits", epochs=epochs, seed=job.seed, pairs=job.replay.mixes, chunk=chunk, about={}
    )
    layout, place = Layout(header, "the plan"), open_place(out)
    missing = sum(len(each.rows) for each in missing_chunks(place, layout))
    return Plan(
        records=len(job.keys) * epochs,
        record_bytes=layout.record_bytes,
        keys_bytes=sum(map(len, encoded)) + 8 * len(encoded),
        missing=missing,
        free=place.free(),
        rate=_rate(job) if timed else None,
        words=f"store:   {place.url}: {len(job.keys):,} photos x {epochs} epochs, the {job.topk} most probable of "
        f"{job.teacher.classes:,} classes of {job.teacher.name}",
    )


def _rate(job: Job) -> float:
    """Photos per second: views and teacher together, without the first batch."""
    order = np.random.default_rng(0).permutation(len(job.keys))

    def batches() -> Iterator[list[Item]]:
        for at in range(10**6):
            yield [(0, int(order[(at * job.batch_size + i) % len(order)])) for i in range(job.batch_size)]

    began, seen = 0.0, 0
    for number, record in enumerate(job.records(batches())):
        now = time.monotonic()
        if number == 0:
            began = first = now
            continue
        seen += len(record["seed"])
        if now - began > TIMED or number == 50:
            return seen / (now - first)
    raise AssertionError("the batches do not end")


def cache_targets(
    out: str | os.PathLike[str],
    job: Job,
    data: str | Path,
    *,
    epochs: int = 300,
    chunk: int | None = None,
    part: tuple[int, int] | None = None,
) -> int:
    """Write what a store still lacks and no other process has claimed; the chunks left to others.

    Args:
        out: The store: a folder, or a URL for fsspec.
        job: Photos and teacher.
        data: The photos, for the header.
        epochs: Views of each photo.
        chunk: Records of a chunk; None: at most 4,096.
        part: Number (from 0) and count of static parts; None: whatever is free.

    Raises:
        ConfigError: the store is another one, or the disk is too small.
        TinyMIMError: the disk is full; what is written stays.
    """
    make_plan(job, out, data, epochs=epochs, chunk=chunk, timed=False).check_room(os.fspath(out))
    with TargetWriter(
        out,
        job.keys,
        arrays=logits_arrays(job.topk),
        epochs=epochs,
        seed=job.seed,
        pairs=job.replay.mixes,
        chunk=chunk,
        about=about(job, data),
    ) as writer:
        layout = writer.layout
        mine = sum(len(each.rows) for each in missing_chunks(writer.place, layout, part))
        total = len(job.keys) * layout.epochs
        progress, done = Progress("cache", total, start=total - mine), total - mine
        damaged = set[str]()
        queue: deque[tuple[Chunk, list[Item]]] = deque()

        def batches() -> Iterator[list[Item]]:
            for each in writer.work(part):
                rows = [(each.epoch, int(position)) for position in layout.photos_of(each)]
                for at in range(0, len(rows), job.batch_size):
                    queue.append((each, rows[at : at + job.batch_size]))
                    yield queue[-1][1]

        records: list[dict[str, np.ndarray]] = []
        try:
            waiting = time.monotonic()
            for record in job.records(batches()):
                now, items = queue.popleft()
                records.append(record)
                writer.renew()
                damaged.update(job.keys[items[i][1]] for i in np.flatnonzero(record["seed"] == UNREADABLE))
                if sum(len(each["seed"]) for each in records) == len(now.rows):
                    writer.write(now, {name: np.concatenate([each[name] for each in records]) for name in records[0]})
                    records = []
                done += len(items)
                progress.update(done, images=len(items))
        except KeyboardInterrupt:
            print("\nnote: what is written stays; the same command goes on", flush=True)
            raise
        finally:
            progress.close()
        left = len(missing_chunks(writer.place, layout))
    for key in sorted(damaged)[:5]:
        print(f"warning: {key} cannot be read: it has no targets")
    if len(damaged) > 5:
        print(f"warning: {len(damaged) - 5} more cannot be read")
    return left


def check_targets(
    out: str | os.PathLike[str], job: Job, *, sample: int = 256, max_dp: float = 0.01, max_differing: float = 0.05
) -> dict[str, float]:
    """Replay a sample of records through the teacher and compare.

    Args:
        out: The store.
        job: The photos and the teacher that the store was made of.
        sample: Records, spread over the chunks that are written.
        max_dp: Largest difference of a stored probability.
        max_differing: Largest mean share of stored classes that are not among the K most probable now (as sets).

    Returns:
        ``records``, ``max_dp``, ``mean_dp``, ``differing``.

    Raises:
        DataError: another teacher, photos that the store does not have, a damaged chunk.
        CheckFailed: beyond a threshold.
    """
    store = TargetStore.open(out, partial=True)
    teacher = store.header.get("teacher", {"name": "", "sha256": None})
    if teacher["sha256"] not in (None, job.teacher.sha256):
        raise DataError(
            f"{out} holds the targets of another teacher",
            f"{teacher['name']} with sha256 {str(teacher['sha256'])[:12]}..., not {job.teacher.name} with "
            f"{job.teacher.sha256[:12]}...",
            "give the --teacher and --teacher-weights that the store was made with",
        )
    if job.topk != store.header.get("topk") or job.teacher.classes != store.header.get("classes"):
        raise DataError(
            f"{out} is of other classes", f"K is {store.header.get('topk')}", "give the store's own teacher"
        )
    absent = {*missing_chunks(store.place, store.layout)}
    layout = store.layout
    numbers = ((epoch, number) for epoch in range(layout.epochs) for number in range(layout.chunks))
    chunks = [chunk for chunk in (layout.at(*each) for each in numbers) if chunk not in absent]
    if not chunks:
        raise DataError(f"{out} holds no chunk yet", "nothing can be checked", "run tinymim cache first")
    rng = np.random.default_rng(0)
    few = [chunks[i] for i in sorted(rng.permutation(len(chunks))[: max(1, min(16, sample // 2))])]
    items: list[Item] = []
    stored: dict[str, list[np.ndarray]] = {"seed": [], "values": [], "indices": []}
    position_of = {key: at for at, key in enumerate(job.keys)}
    for chunk in few:
        arrays, photos = store.read(chunk), layout.photos_of(chunk)
        pairs = rng.permutation(math.ceil(len(photos) / 2))[: math.ceil(sample / len(few) / 2)]
        for row in sorted(row for pair in pairs for row in (2 * pair, 2 * pair + 1) if row < len(photos)):
            key = store.keys[int(photos[row])]
            if key not in position_of:
                raise DataError(
                    f"{key} is not in --data",
                    f"the store holds its targets; --data has {len(job.keys):,} other photos",
                    "give the --data that the store was made of",
                )
            if arrays["seed"][row] != UNREADABLE:
                items.append((chunk.epoch, position_of[key]))
                for name, rows in stored.items():
                    rows.append(arrays[name][row])
    seeds = Seeds(0, {item: int(seed) for item, seed in zip(items, stored["seed"], strict=True)})
    batches = iter([items[at : at + job.batch_size] for at in range(0, len(items), job.batch_size)])
    progress, now = Progress("check", len(items)), list[Tensor]()
    for probabilities_BC in job.probabilities(batches, seeds):
        now.append(probabilities_BC)
        progress.update(sum(map(len, now)), images=len(probabilities_BC))
    progress.close()
    probabilities_RC = torch.cat(now)
    indices_RK = torch.from_numpy(np.stack(stored["indices"]).astype(np.int64))
    values_RK = torch.from_numpy(np.stack(stored["values"]).astype(np.float32))
    if int(indices_RK.max()) >= probabilities_RC.shape[1]:
        raise DataError(
            f"{out} names the class {int(indices_RK.max())}",
            f"the teacher has {probabilities_RC.shape[1]}",
            "write it anew",
        )
    dp_RK = (probabilities_RC.gather(1, indices_RK) - values_RK).abs()
    top_RK = probabilities_RC.topk(job.topk).indices
    kept_R = (indices_RK[:, :, None] == top_RK[:, None, :]).any(2).float().mean(1)
    found = {
        "records": float(len(items)),
        "max_dp": float(dp_RK.max()),
        "mean_dp": float(dp_RK.mean()),
        "differing": float(1 - kept_R.mean()),
    }
    words = (
        f"largest |dp| {found['max_dp']:.2g}, mean {found['mean_dp']:.2g}, differing classes {found['differing']:.2%}"
    )
    print(f"check:   {len(items)} of {len(store):,} records through {job.teacher.name}: {words}", flush=True)
    if found["max_dp"] > max_dp or found["differing"] > max_differing:
        raise CheckFailed(
            f"{out} is not what {job.teacher.name} gives now",
            f"{words}; at most {max_dp:g} and {max_differing:.0%} are allowed",
            "check that photos, Pillow and --amp are those of the header (store.json), or write the store anew",
        )
    return found
