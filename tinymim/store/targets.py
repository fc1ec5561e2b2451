"""Reading a target store: ``store[key, epoch]``, memory-mapped, from a folder or through fsspec."""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinymim.errors import DataError
from tinymim.schema import parse
from tinymim.store.header import TargetHeader
from tinymim.store.layout import HEADER, KEYS, Chunk, Keys, Layout, Mapped, folder_of
from tinymim.store.places import Place, open_place

Opened = TypeVar("Opened")
OPEN = 512  # chunks that one process keeps mapped: each holds a file descriptor, of 1024 that are usual


class NoTargets(DataError):
    """Targets of a photo that was damaged when the store was made."""


class TargetStore:
    """The targets of a teacher: one record for each photo and epoch. Open it with :meth:`open`.

    Pickled it is a path, so that data workers open it themselves; what they map they share. A chunk is checked
    (checksum, store, epoch) when a process first reads from it.

    Attributes:
        header: ``store.json``: kind, arrays, photos, epochs, seed, teacher, topk, classes, augmentation, versions...
        keys: The photos, sorted.
    """

    def __init__(self, place: Place, header: TargetHeader) -> None:
        self.place, self.header = place, header
        self.layout = Layout(header, f"{place.url}/{HEADER}")
        expected = {"keys_sha256": header["keys_sha256"]}
        self.keys = self._mapped(KEYS, lambda path: Keys(path, self.layout.photos, expected))
        self._open: OrderedDict[tuple[int, int], Mapped] = OrderedDict()
        self._checked = set[tuple[int, int]]()
        self._rows: tuple[int, np.ndarray] | None = None

    @classmethod
    def open(
        cls, url: str | os.PathLike[str], *, copies: str | Path | None = None, partial: bool = False
    ) -> "TargetStore":
        """Open a store.

        Args:
            url: Its folder, or a URL for fsspec.
            copies: Local folder for the chunks of a remote store; None: one below the user's cache folder.
            partial: Also a store that is still being written.

        Raises:
            DataError: there is none, it is damaged, or (without ``partial``) chunks are missing.
            ConfigError: an unknown protocol.
        """
        place = open_place(url, copies)
        store = cls(place, read_header(place))
        if not partial and (missing := store.missing()):
            raise DataError(
                f"the store {place.url} is not complete",
                f"{len(missing):,} of {store.layout.epochs * store.layout.chunks:,} chunks are missing, the first is "
                f"{missing[0].name}",
                "run the same tinymim cache again: it goes on where it stopped",
            )
        return store

    def __reduce__(self) -> Any:
        return _reopen, (self.place.url, self.place.copies)

    def __len__(self) -> int:
        """Records in all."""
        return self.layout.photos * self.layout.epochs

    def __contains__(self, key: object) -> bool:
        """Whether there are targets of a photo."""
        return isinstance(key, str) and self.keys.find(key) is not None

    def __getitem__(self, key: tuple[str, int]) -> dict[str, Any]:
        """The record of a photo in an epoch: name -> array; a whole number for an array without axes.

        Raises:
            DataError: no such photo or epoch, the photo could not be read when the store was made, or its chunk is
                missing, damaged or another store's.
        """
        name, epoch = key
        position = self.keys.find(name)
        if position is None:
            raise DataError(
                f"no targets of {name}",
                f"{self.place.url} holds those of {len(self.keys):,} other photos, the first is {self.keys[0]}",
                "give the --data that the store was made of, or cache these photos in a store of their own",
            )
        if not 0 <= epoch < self.layout.epochs:
            raise DataError(
                f"no targets of epoch {epoch}",
                f"{self.place.url} holds the epochs 0 to {self.layout.epochs - 1}",
                f"train for at most {self.layout.epochs} epochs, or add some: tinymim cache --epochs N",
            )
        number, row = divmod(self._row(position, epoch), self.layout.chunk)
        arrays = self._chunk(epoch, number).arrays
        record = {name: value[row].copy() if value.ndim > 1 else value[row].item() for name, value in arrays.items()}
        if record.get("seed", 0) < 0:
            raise NoTargets(
                f"no targets of {name}", "the photo could not be read when the store was made", "remove or replace it"
            )
        return record

    def missing(self) -> list[Chunk]:
        """The chunks that are not written yet."""
        return missing_chunks(self.place, self.layout)

    def read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """A chunk whole: name -> (R, ...), in the order of its rows; read-only.

        Raises:
            DataError: it is missing, damaged or another store's.
        """
        return self._chunk(chunk.epoch, chunk.number).arrays

    def _row(self, position: int, epoch: int) -> int:
        if not self.header["pairs"]:
            return position
        if self._rows is None or self._rows[0] != epoch:
            order = self.layout.order(epoch)
            assert order is not None
            self._rows = epoch, np.argsort(order)
        return int(self._rows[1][position])

    def _mapped(self, name: str, read: Callable[[Path], Opened]) -> Opened:
        try:
            return read(self.place.local(name))
        except DataError:
            if not self.place.forget(name):
                raise
            return read(self.place.local(name))  # the copy was damaged, or of a store that lay at this URL before

    def _chunk(self, epoch: int, number: int) -> Mapped:
        if (found := self._open.get((epoch, number))) is not None:
            self._open.move_to_end((epoch, number))
            return found
        chunk = self.layout.at(epoch, number)
        shape = [replace(array, shape=(len(chunk.rows), *array.shape)) for array in self.layout.arrays]
        remedy = f"remove {chunk.name} from {self.place.url} and run the same tinymim cache again: it writes it anew"
        expected = self.layout.expected(chunk)
        known = (epoch, number) in self._checked  # its checksum need not be compared again
        mapped = self._mapped(chunk.name, lambda path: Mapped(path, shape, expected, remedy, checked=known))
        self._checked.add((epoch, number))
        self._open[epoch, number] = mapped
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return mapped


def missing_chunks(place: Place, layout: Layout, part: tuple[int, int] | None = None) -> list[Chunk]:
    """The chunks that are not written yet; of a part (number from 0, of how many) only its own."""
    found = []
    for epoch in range(layout.epochs):
        there = {*place.names(folder_of(epoch))}
        for number in range(layout.chunks):
            chunk = layout.at(epoch, number)
            if owns(layout, chunk, part) and chunk.name.rpartition("/")[2] not in there:
                found.append(chunk)
    return found


def owns(layout: Layout, chunk: Chunk, part: tuple[int, int] | None) -> bool:
    """Whether a chunk belongs to a part (number from 0, of how many); None: all do."""
    return part is None or (chunk.epoch * layout.chunks + chunk.number) % part[1] == part[0]


def read_header(place: Place) -> TargetHeader:
    """``store.json``.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if not place.exists(HEADER):
        official = any(name.startswith("logits_top") for name in place.names(""))
        raise DataError(
            f"no target store at {place.url}",
            "it is in TinyViT's published format" if official else f"there is no {HEADER}",
            f"convert it: tinymim cache --from-official {place.url} --out STORE"
            if official
            else "write one: tinymim cache --teacher timm/NAME --data FOLDER --out STORE",
        )
    header: TargetHeader = parse(place.read(HEADER).decode("utf-8", "replace"), TargetHeader, f"{place.url}/{HEADER}")
    return header


def _reopen(url: str, copies: Path | None) -> TargetStore:
    return TargetStore.open(url, copies=copies, partial=True)
