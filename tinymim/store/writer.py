"""Writing a target store: any number of processes and machines, each chunk by one of them, killed at any moment."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import versions
from tinymim.folders import NoLocks
from tinymim.store.header import TargetHeader
from tinymim.store.layout import (
    CHUNK,
    CHUNK_BYTES,
    CHUNKS,
    HEADER,
    KEYS,
    Array,
    Chunk,
    Layout,
    SortedKeys,
    check_same,
    encode_keys,
    sorted_keys,
)
from tinymim.store.places import Claim, Place, open_place
from tinymim.store.targets import missing_chunks, read_header


def make_header(
    keys: Sequence[bytes],
    arrays: Sequence[Array],
    *,
    kind: str,
    epochs: int,
    seed: int,
    pairs: bool,
    chunk: int | None,
    about: Mapping[str, Any],
) -> TargetHeader:
    """The header of a new store; ``chunk``: records of a chunk, None for the default, always even."""
    if chunk is None:
        most = CHUNK_BYTES // max(1, sum(array.bytes for array in arrays))
        chunk = max(1, min(max(CHUNK, -(-len(keys) // CHUNKS)), most))
    return {
        "format": "tinymim.targets",
        "version": 1,
        "kind": kind,
        "arrays": [{"name": a.name, "dtype": a.dtype, "shape": [*a.shape]} for a in arrays],
        "photos": len(keys),
        "epochs": epochs,
        "chunk": chunk + chunk % 2,  # two photos that are mixed lie in one
        "seed": seed,
        "pairs": pairs,
        "keys_sha256": encode_keys(keys)[1],
        **about,  # type: ignore[typeddict-item]
        "versions": versions(),
    }


class TargetWriter:
    """Writes chunks of a store; one that is there with the same settings is continued.

    Args:
        url: The folder, or a URL for fsspec.
        keys: The photos: paths below the data folder, with ``/``; sorted here, or by ``sorted_keys``.
        arrays: What a record holds.
        epochs: More than the store has: they are added.
        kind: What the targets are, e.g. "logits".
        seed: Of the views.
        pairs: Whether the photos of rows 2i and 2i + 1 are mixed with each other.
        chunk: Records of a chunk; None: 4,096, more if an epoch had over 256 chunks, at most 64 MiB.
        about: More of the header: teacher, topk, classes, augmentation, precision, data.

    Raises:
        ConfigError: the store that is there is another one.
        DataError: a key twice; the header there is damaged.
        TinyMIMError: it cannot be written.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        keys: Iterable[str] | SortedKeys,
        *,
        arrays: Sequence[Array],
        epochs: int,
        kind: str = "logits",
        seed: int = 0,
        pairs: bool = False,
        chunk: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.place: Place = open_place(url)
        self.keys = sorted_keys(keys)
        wanted = make_header(
            self.keys, arrays, kind=kind, epochs=epochs, seed=seed, pairs=pairs, chunk=chunk, about=about or {}
        )
        Layout(wanted, "the new store")  # before anything is written
        self.place.clean()
        self.layout = Layout(self._begin(wanted, chunk is None), f"{self.place.url}/{HEADER}")
        self._claims: dict[Chunk, Claim] = {}

    def _begin(self, wanted: TargetHeader, any_chunk: bool) -> TargetHeader:
        """Write keys and header, or compare with those there; one process at a time."""
        for _ in range(200):
            if self.place.exists(HEADER):
                found = read_header(self.place)
                if any_chunk:
                    wanted["chunk"] = found["chunk"]
                check_same(found, wanted, self.place.url)
                if found["epochs"] >= wanted["epochs"] and self.place.exists(KEYS):
                    return found
                wanted = found | {"epochs": max(found["epochs"], wanted["epochs"])}  # type: ignore[operator]
            try:
                claim = self.place.claim("header")
            except NoLocks:
                claim = Claim(lambda: None)
            if claim is None:
                time.sleep(0.05)
                continue
            self.place.write(KEYS, encode_keys(self.keys)[0])
            self.place.write(HEADER, (json.dumps(wanted, indent=1) + "\n").encode())
            claim.release()
            return wanted
        raise ConfigError(
            f"{self.place.url} is in use", "another process has been writing its header for ten seconds", "try it again"
        )

    def __enter__(self) -> "TargetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()
        with suppress(TinyMIMError):
            for old in self.place.names("claims"):  # a kill may come after a chunk has its name
                numbers = [int(word) for word in old.split("-") if word.isdecimal()]
                chunk = self.layout.at(numbers[0], numbers[1]) if len(numbers) == 2 else None
                if (chunk is None or self.place.exists(chunk.name)) and (own := self.place.claim(old)):
                    own.release()
        self.place.clean()

    def work(self, part: tuple[int, int] | None = None, absent: Iterable[Chunk] | None = None) -> Iterator[Chunk]:
        """Chunks to write, each claimed until :meth:`write`; those that other processes have or write are left out.

        Args:
            part: Number (from 0) and count of the static parts; None: whatever is free.
            absent: The chunks of the part that were not there, if that is known; None: they are looked for.

        Raises:
            NoLocks: the place has no claims, and no part was given.
        """
        for chunk in missing_chunks(self.place, self.layout, part) if absent is None else absent:
            try:
                claim = self.place.claim(f"{chunk.epoch:05d}-{chunk.number:06d}")
            except NoLocks:
                if part is None:
                    raise
                claim = Claim(lambda: None)  # nobody else has this part
            if claim is None:
                continue
            if self.place.exists(chunk.name):  # meanwhile
                claim.release()
                continue
            self._claims[chunk] = claim
            yield chunk

    def renew(self) -> None:
        """Say that this process still works on what it has claimed; to be called every minute or more often."""
        for claim in self._claims.values():
            claim.renew()

    def write(self, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a chunk and give up its claim.

        Args:
            chunk: One of :meth:`work`, or any.
            arrays: Name -> (R, ...).

        Raises:
            DataError: other names, shapes or ranges than declared.
            TinyMIMError: the disk is full; the other chunks are whole, and the same command goes on.
        """
        self.place.write(chunk.name, self.layout.encode(chunk, arrays))
        claim = self._claims.pop(chunk, None)
        if claim is not None:
            claim.release()
