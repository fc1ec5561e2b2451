"""``tinymim cache``: a teacher looks once at every photo in every epoch, and what students need of it is kept."""

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinymim.errors import ConfigError
from tinymim.progress import Progress, clock, say
from tinymim.store.job import UNREADABLE, Item, Job, about
from tinymim.store.layout import HEADER, Chunk, Layout, check_same
from tinymim.store.places import open_place
from tinymim.store.targets import missing_chunks, owns, read_header
from tinymim.store.writer import TargetWriter, make_header

TIMED = 8.0  # seconds a plan takes to time the teacher, about


@dataclass
class Plan:
    """What a store will take.

    Attributes:
        records: In all.
        epoch_bytes: Bytes of the records of an epoch.
        record_bytes: Bytes of one.
        keys_bytes: Bytes of the index.
        missing: Records not written yet.
        free: Bytes that the disk has left; None: unknown.
        rate: Photos per second of this machine; None: not timed.
        words: The first line to print.
        compare: Name, photos and epochs of a large job.
        absent: The chunks that are not written yet.
    """

    records: int
    epoch_bytes: int
    record_bytes: int
    keys_bytes: int
    missing: int
    free: int | None
    rate: float | None
    words: str
    compare: tuple[str, int, int]
    absent: list[Chunk]

    def print(self) -> None:
        """GiB, hours, and the same for a large job."""
        print(self.words)
        size = self.records * self.record_bytes + self.keys_bytes
        room = "" if self.free is None else f"; free: {_size(self.free)}"
        print(
            f"size:    {_size(size)}: {self.record_bytes:,} bytes a view, {_size(self.epoch_bytes)} an epoch, "
            f"{_size(self.keys_bytes)} of keys{room}"
        )
        if self.missing < self.records:
            print(
                f"there:   {self.records - self.missing:,} records; {_size(self.missing * self.record_bytes)} to write"
            )
        if self.rate:
            print(f"speed:   {self.rate:.1f} images/s here: {_hours(self.missing / self.rate)} for what is missing")
        name, photos, epochs = self.compare
        hours = f", {_hours(photos * epochs / self.rate)} on one such machine" if self.rate else ""
        print(
            f"compare: {name} ({photos:,} photos, {epochs} epochs) like this: "
            f"{_size(photos * epochs * self.record_bytes)}{hours}",
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
                f"{_size(needed)} are to be written, {_size(self.free)} are free",
                "choose another --out, or a smaller --topk, --form or --epochs",
            )


def _size(number: int) -> str:
    if number >= 2**27:
        return f"{number / 2**30:,.2f} GiB"
    return f"{number / 2**20:,.2f} MiB" if number >= 2**17 else f"{number / 2**10:,.2f} KiB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else clock(seconds)


def make_plan(
    job: Job, out: str | os.PathLike[str], data: str | Path, *, epochs: int, chunk: int | None, timed: bool
) -> Plan:
    """What a store takes; with ``timed`` the speed of a few batches. Nothing is written.

    Raises:
        ConfigError: the store at ``out`` is another one.
    """
    place = open_place(out)
    found = read_header(place) if place.exists(HEADER) else None
    header = make_header(
        job.encoded,
        job.asked.arrays,
        kind=job.asked.kind,
        epochs=epochs,
        seed=job.seed,
        pairs=job.replay.mixes,
        chunk=found["chunk"] if found and chunk is None else chunk,
        about=about(job, data),
    )
    if found:
        check_same(found, header, place.url)
    layout = Layout(header, "the plan")
    absent = missing_chunks(place, layout)
    return Plan(
        records=len(job.keys) * epochs,
        epoch_bytes=len(job.keys) * layout.record_bytes,
        record_bytes=layout.record_bytes,
        keys_bytes=sum(map(len, job.encoded)) + 8 * len(job.encoded),
        missing=sum(len(each.rows) for each in absent),
        free=place.free(),
        rate=_rate(job) if timed else None,
        words=f"store:   {place.url}: {len(job.keys):,} photos x {epochs} epochs, {job.asked.words}",
        compare=job.asked.compare,
        absent=absent,
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
        chunk: Records of a chunk; None: see :class:`TargetWriter`.
        part: Number (from 0) and count of static parts; None: whatever is free.

    Raises:
        ConfigError: the store is another one, or the disk is too small.
        TinyMIMError: the disk is full; what is written stays.
    """
    plan = make_plan(job, out, data, epochs=epochs, chunk=chunk, timed=False)
    plan.check_room(os.fspath(out))
    with TargetWriter(
        out,
        job.encoded,
        kind=job.asked.kind,
        arrays=job.asked.arrays,
        epochs=epochs,
        seed=job.seed,
        pairs=job.replay.mixes,
        chunk=chunk,
        about=about(job, data),
    ) as writer:
        layout = writer.layout
        whole = layout.epochs > epochs  # the store has more than were planned
        absent = (
            missing_chunks(writer.place, layout, part) if whole else [c for c in plan.absent if owns(layout, c, part)]
        )
        mine = sum(len(each.rows) for each in absent)
        total = len(job.keys) * layout.epochs
        progress, done = Progress("cache", total, start=total - mine), total - mine
        damaged = set[str]()
        queue: deque[tuple[Chunk, list[Item]]] = deque()

        def batches() -> Iterator[list[Item]]:
            for each in writer.work(part, absent):
                rows = [(each.epoch, int(position)) for position in layout.photos_of(each)]
                for at in range(0, len(rows), job.batch_size):
                    queue.append((each, rows[at : at + job.batch_size]))
                    yield queue[-1][1]

        records: list[dict[str, np.ndarray]] = []
        try:
            for record in job.records(batches()):
                now, items = queue.popleft()
                records.append(record)
                writer.renew()
                damaged.update(job.keys[items[i][1]] for i in np.flatnonzero(record["seed"] == UNREADABLE))
                if sum(len(each["seed"]) for each in records) == len(now.rows):
                    writer.write(now, {name: np.concatenate([each[name] for each in records]) for name in records[0]})
                    records = []
                done += len(items)
                progress.update(done, images=len(items), waited=job.waited)
        except KeyboardInterrupt:
            say("\nnote: what is written stays; the same command goes on")
            raise
        finally:
            progress.close()
        left = len(missing_chunks(writer.place, layout))
    for key in sorted(damaged)[:5]:
        say(f"warning: {key} cannot be read: it has no targets")
    if len(damaged) > 5:
        say(f"warning: {len(damaged) - 5} more cannot be read")
    return left
