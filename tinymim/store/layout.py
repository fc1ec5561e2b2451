"""What a target store holds, and where: ``store.json``, ``keys.safetensors``, ``chunks/EPOCH/NUMBER.safetensors``.

A record is what is kept of one photo in one epoch: named arrays of fixed shapes. Photos are sorted by key (a path below
the data folder), and the records of an epoch lie in that order in chunks of equal length: a record is found by
arithmetic, and only the keys have an index. Every file is a safetensors file, with a CRC-32 of its arrays and the store
it belongs to in the metadata.

Legend: R = records of a chunk, N = photos.
"""

import bisect
import hashlib
import itertools
import json
import math
import mmap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np

from tinymim.errors import ConfigError, DataError
from tinymim.schema import check, parse
from tinymim.store.header import TargetHeader

HEADER, KEYS = "store.json", "keys.safetensors"
DTYPES = {  # numpy's names -> safetensors'
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
}
ANY = -1  # the length of an array that only its file knows
LONGEST = 2**20  # bytes of a safetensors header of ours
CHUNK, CHUNKS, CHUNK_BYTES = 4096, 256, 64 << 20  # least records of a chunk, most chunks of an epoch, most bytes
FREE = ("epochs", "versions", "data")  # of the header: what may differ between two runs that write to one store


@dataclass(frozen=True)
class Array:
    """An array of every record.

    Attributes:
        name: Its name.
        dtype: One of :data:`DTYPES`.
        shape: Without the axis of records.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Of one record."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def logits_arrays(topk: int) -> list[Array]:
    """Arrays of sparse logits, 4 + 4K bytes: the view's seed, the K largest probabilities and their classes."""
    return [Array("seed", "int32"), Array("values", "float16", (topk,)), Array("indices", "uint16", (topk,))]


@dataclass(frozen=True)
class Chunk:
    """Some records of an epoch.

    Attributes:
        epoch: From 0.
        number: Of the chunk in its epoch.
        rows: Which records of the epoch.
    """

    epoch: int
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Its file."""
        return f"{folder_of(self.epoch)}/{self.number:06d}.safetensors"


def folder_of(epoch: int) -> str:
    """The folder of an epoch's chunks."""
    return f"chunks/{epoch:05d}"


class Layout:
    """Where the records of a store lie.

    Args:
        header: ``store.json``.
        source: What errors call it.

    Raises:
        DataError: a header that no version of ours has written.
    """

    def __init__(self, header: TargetHeader, source: str) -> None:
        self.header: TargetHeader = check(header, TargetHeader, source)
        self.source = source
        self.arrays = [Array(each["name"], each["dtype"], tuple(each["shape"])) for each in header["arrays"]]
        names = [array.name for array in self.arrays]
        unknown = [array.dtype for array in self.arrays if array.dtype not in DTYPES]
        if unknown or len({*names}) < len(names):
            why = f"it has the type {unknown[0]!r}" if unknown else "it names an array twice"
            raise DataError(f"cannot use {source}", why, f"types are {', '.join(DTYPES)}")
        self.photos, self.epochs, self.chunk = header["photos"], header["epochs"], header["chunk"]
        self.chunks = -(-self.photos // self.chunk)  # of an epoch
        self.identity = identity(header)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(array.bytes for array in self.arrays)

    def at(self, epoch: int, number: int) -> Chunk:
        """A chunk by its number."""
        first = number * self.chunk
        return Chunk(epoch, number, range(first, min(first + self.chunk, self.photos)))

    def order(self, epoch: int) -> np.ndarray | None:
        """Photos (N,) of an epoch's rows, where rows 2i and 2i + 1 are mixed with each other; None: sorted.

        It is :func:`tinymim.data.replay.pairs`: whoever trains from the store pairs them alike.
        """
        if not self.header["pairs"]:
            return None
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.header["seed"], epoch, 2])
            self._order = epoch, rng.permutation(self.photos)
        return self._order[1]

    def photos_of(self, chunk: Chunk) -> np.ndarray:
        """Photos (R,), positions in the sorted keys, of a chunk's rows."""
        rows, order = chunk.rows, self.order(chunk.epoch)
        return np.arange(rows.start, rows.stop) if order is None else order[rows.start : rows.stop]

    def expected(self, chunk: Chunk) -> dict[str, str]:
        """What the metadata of a chunk say, besides its checksum."""
        return {"store": self.identity, "epoch": str(chunk.epoch), "chunk": str(chunk.number)}

    def encode(self, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> bytes:
        """A chunk as the bytes of its file.

        Raises:
            DataError: other names or shapes than declared, or values that the declared types cannot hold.
        """
        names = [array.name for array in self.arrays]
        if {*arrays} != {*names}:
            raise DataError(
                f"the records have {', '.join(arrays)}", f"{self.source} holds {', '.join(names)}", "give these arrays"
            )
        own = {array.name: _fit(array, arrays[array.name], len(chunk.rows)) for array in self.arrays}
        return encode(own, self.expected(chunk))


def encode(arrays: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> bytes:
    """A safetensors file with the CRC-32 of its arrays, in their order, in the metadata."""
    from safetensors.numpy import save

    note = json.dumps({**meta, "crc32": _crc(arrays.values())}, sort_keys=True)
    return save(dict(arrays), metadata={"tinymim": note})  # safetensors writes several notes in any order


def _crc(arrays: Iterable[np.ndarray]) -> str:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.data if array.size else b"", crc)
    return f"{crc:08x}"


def _fit(array: Array, given: np.ndarray, records: int) -> np.ndarray:
    """An array in its declared type.

    Raises:
        DataError: another shape, or values beyond the type.
    """
    given = np.asarray(given)
    wanted = np.dtype(array.dtype)
    if given.shape != (records, *array.shape):
        raise DataError(
            f"{array.name!r} has the shape {given.shape}",
            f"{records} records of {array.shape or 'one number'} were declared",
            "give one row a record",
        )
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise DataError(
            f"{array.name!r} cannot be stored", "it holds NaN or infinities", "look at what the teacher gives"
        )
    if given.dtype != wanted and given.size:
        low, high = given.min(), given.max()
        limits: Any = np.iinfo(wanted) if wanted.kind in "iu" else np.finfo(wanted)
        whole = wanted.kind not in "iu" or given.dtype.kind in "iu"
        if not (limits.min <= low and high <= limits.max and whole):
            found = low if low < limits.min else high
            why = (
                f"{array.dtype} holds whole numbers only" * (not whole)
                or f"{found} is beyond {limits.max:,} of {array.dtype}"
            )
            raise DataError(f"{array.name!r} cannot be stored", why, "declare a wider type, or correct the values")
    return np.ascontiguousarray(given, wanted)


class _Tensor(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Mapped:
    """A safetensors file of ours in memory, checked once.

    Args:
        path: The file.
        arrays: What it must hold, with the axis of records.
        expected: What its metadata must say.
        remedy: What an error says to type.
        checked: Whether its checksum was compared before.

    Raises:
        DataError: it is missing, truncated, damaged, or another store's.
    """

    def __init__(
        self, path: Path, arrays: Sequence[Array], expected: Mapping[str, str], remedy: str, *, checked: bool = False
    ) -> None:
        def damaged(why: str) -> DataError:
            return DataError(f"{path} is damaged", why, remedy)

        try:
            with open(path, "rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(f"{path} is missing", "the store is not complete", remedy) from None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise damaged(getattr(error, "strerror", None) or str(error)) from None
        size = len(self.memory)
        length = int.from_bytes(self.memory[:8], "little")
        if size < 8 or length > min(size - 8, LONGEST):
            raise damaged("it is cut off, or no safetensors file")
        text = self.memory[8 : 8 + length].decode("utf-8", "replace")
        try:
            found = parse(text, dict[str, Any], str(path))
            notes = check(found.pop("__metadata__", {}), dict[str, str], str(path))
            self.meta: dict[str, str] = parse(notes.get("tinymim", "{}"), dict[str, str], str(path))
            tensors: dict[str, _Tensor] = check(found, cast(Any, dict[str, _Tensor]), str(path))
        except DataError as error:
            raise damaged(error.why) from None
        for name, value in expected.items():
            if self.meta.get(name) != value:
                why = f"its {name} is {self.meta.get(name, '(none)')[:80]}, not {value}: it is no part of this store"
                raise DataError(f"{path} does not belong here", why, remedy)
        if {*tensors} != {array.name for array in arrays}:
            raise damaged(f"it holds {', '.join(tensors)[:200]}")
        self.arrays: dict[str, np.ndarray] = {}
        for array in arrays:
            about = tensors[array.name]
            first, last = about["data_offsets"]
            if array.shape == (ANY,) and len(about["shape"]) == 1:
                array = replace(array, shape=(about["shape"][0],))
            if (about["dtype"], tuple(about["shape"])) != (DTYPES[array.dtype], array.shape):
                raise damaged(f"{array.name} is {about['dtype']} {about['shape']}")
            if last - first != array.bytes or first < 0 or 8 + length + last > size:
                raise damaged(f"{size:,} bytes are there, {8 + length + last:,} were written")
            flat = np.frombuffer(self.memory, array.dtype, math.prod(array.shape), 8 + length + first)
            self.arrays[array.name] = flat.reshape(array.shape)
        if not checked and _crc(self.arrays.values()) != self.meta.get("crc32"):
            raise damaged("its content does not have the checksum it was written with: a bit has flipped")


class Keys(Sequence[str]):
    """The sorted keys of a store; they stay in the file, which all processes share.

    Args:
        path: ``keys.safetensors``.
        photos: N.
        expected: Its metadata.

    Raises:
        DataError: see :class:`Mapped`; or a file whose lengths do not fit.
    """

    def __init__(self, path: Path, photos: int, expected: Mapping[str, str]) -> None:
        remedy = "restore it from a copy, or remove it and run the same tinymim cache again"
        file = Mapped(path, [Array("ends", "uint64", (photos,)), Array("text", "uint8", (ANY,))], expected, remedy)
        self._ends, self._text = file.arrays["ends"].data, file.arrays["text"].data
        if self._ends[-1] != len(self._text):
            raise DataError(f"{path} is damaged", "the keys do not fill their text", remedy)

    def __len__(self) -> int:
        return len(self._ends)

    def _bytes(self, at: int) -> bytes:
        return bytes(self._text[self._ends[at - 1] if at else 0 : self._ends[at]])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._bytes(at % len(self)).decode("utf-8", "surrogateescape")

    def find(self, key: str) -> int | None:
        """Position of a key; None: there is none."""
        wanted = key.encode("utf-8", "surrogateescape")
        at = bisect.bisect_left(range(len(self)), wanted, key=self._bytes)
        return at if at < len(self) and self._bytes(at) == wanted else None


class SortedKeys(list[bytes]):
    """Keys as :func:`sorted_keys` gives them."""


def sorted_keys(keys: Iterable[str] | SortedKeys) -> SortedKeys:
    """Keys in the order of a store; those that were sorted here stay as they are.

    Raises:
        DataError: a key twice, or none.
    """
    if isinstance(keys, SortedKeys):
        return keys
    found = SortedKeys(sorted(key.encode("utf-8", "surrogateescape") for key in keys))
    twice = next((a for a, b in itertools.pairwise(found) if a == b), None)
    if twice is not None or not found:
        what = "no photos" if twice is None else f"the key {twice.decode('utf-8', 'replace')!r} occurs twice"
        raise DataError(what, "a store has one record of each photo in an epoch", "check the list of photos")
    return found


def encode_keys(keys: Sequence[bytes]) -> tuple[bytes, str]:
    """``keys.safetensors`` for sorted keys, and the sha256 of the keys that is in the header."""
    text = b"".join(keys)
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint64)
    digest = hashlib.sha256(b"\0".join(keys)).hexdigest()
    return encode({"ends": ends, "text": np.frombuffer(text, np.uint8)}, {"keys_sha256": digest}), digest


def identity(header: Mapping[str, Any]) -> str:
    """A hash of all of a header that its chunks depend on."""
    fixed = {key: value for key, value in header.items() if key not in FREE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Whether a store is the one that is wanted.

    Raises:
        ConfigError: it has other values; each is named.
    """

    def flat(header: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in header.items():
            inside = (
                {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
            )
            out |= {} if key in (*FREE, "arrays") else inside
        return out

    ours, theirs = flat(wanted), flat(found)
    changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if "keys_sha256" in changed and "photos" in changed:
        changed.remove("keys_sha256")
    if changed:
        words = [
            f"{'photos' if key == 'keys_sha256' else key} ({_short(theirs.get(key))}, not {_short(ours.get(key))})"
            for key in changed
        ]
        raise ConfigError(
            f"{source} is another store",
            f"it differs in {', '.join(words)}",
            "continue it with its own settings, or choose a new --out",
        )


def _short(value: Any) -> str:
    return str(value)[:40] if value is not None else "none"
