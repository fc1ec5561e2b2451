"""Photos in .tar shards (WebDataset's): found by name through an index and read in place. Standard library only.

A photo in a shard has the path ``SHARD.tar/NAME``, with its name in the tar, so it is listed, sorted, named in messages
and opened like a file in a folder. Nothing of a tar is ever unpacked: names are texts, links and devices are passed
over. Where a name occurs twice the last one counts, as in tar.
"""

import bisect
import functools
import glob
import itertools
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.errors import DataError, TinyMIMError
from tinymim.files import write_json
from tinymim.records import ShardIndex
from tinymim.schema import read_json

SUFFIX = ".tar"
COMPRESSED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
)  # have no index: reading one photo means reading all
LARGEST = 1 << 29  # bytes of one photo
_BLOCK = 512  # of a tar
_RANGE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_WILD = re.compile(r"[*?]")
_MOST = 100_000  # shards of one pattern


@dataclass(frozen=True)
class Shard:
    """The regular files of a .tar.

    Attributes:
        path: The .tar.
        size: Its bytes.
        mtime_ns: When it was last written, nanoseconds since 1970.
        names: Names, sorted.
        offsets: First byte of each.
        sizes: Bytes of each.
        passed: Members that are left out.
    """

    path: str
    size: int
    mtime_ns: int
    names: list[str]
    offsets: "array[int]"
    sizes: "array[int]"
    passed: int = 0

    def find(self, name: str) -> int:
        """Position of a name.

        Raises:
            FileNotFoundError: there is none.
        """
        at = bisect.bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            raise FileNotFoundError(f"{self.path} holds no {name}")
        return at

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: there is none of this name, it is too large, or the shard has changed since it was indexed.
        """
        at = self.find(name)
        offset, size = self.offsets[at], self.sizes[at]
        if size > LARGEST:
            raise OSError(f"it has {size} bytes, more than {LARGEST}")
        with open(self.path, "rb") as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
                raise OSError("its shard was changed while it was in use")
            file.seek(offset)
            return file.read(size)


def find_shards(data: str | Path, photos: Iterable[str] = ()) -> list[str] | None:
    """The shards that ``--data`` names: a .tar, a pattern of them (:func:`matches`), or a folder of them.

    Args:
        data: The path.
        photos: Suffixes of photos, in lower case: a folder that also holds such files, or folders, is one of photos.

    Returns:
        Paths in the order of their names; None: it names no shards.

    Raises:
        DataError: a shard of the pattern is missing, or the pattern has too many.
    """
    text = os.fspath(data)
    if (found := matches(text)) is not None:
        if not found or not all(path.endswith(SUFFIX) for path in found):
            return None
        missing = [path for path in found if not os.path.isfile(path)]
        if missing:
            raise DataError(
                f"no shard at {missing[0]}",
                f"{len(missing)} of the {len(found)} files of {text} are missing",
                "check the pattern: {000..146} counts from 000 to 146",
            )
        return found
    if os.path.isfile(text):
        return [text] if text.endswith(SUFFIX) else None
    tars: list[str] = []
    try:
        with os.scandir(text) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if entry.is_dir() or entry.name.lower().endswith(tuple(photos) or "/"):
                    return None
                if entry.name.endswith(SUFFIX) and entry.is_file():
                    tars.append(entry.path)
    except OSError:  # said by whoever lists the folder
        return None
    return sorted(tars) or None


def matches(data: str | Path) -> list[str] | None:
    """Paths that a pattern with {000..146}, {a,b}, * or ? names, in the order of the braces; None: it is no pattern.

    Raises:
        DataError: it names too many.
    """
    text = os.fspath(data)
    if os.path.exists(text) or not (_RANGE.search(text) or _WILD.search(text)):
        return None
    paths = [sorted(glob.glob(path)) if _WILD.search(path) else [path] for path in _expand(text)]
    return list(dict.fromkeys(itertools.chain(*paths)))


def base(data: str | Path) -> Path:
    """The folder, or file, that a ``--data`` names; of a pattern the folder that it begins in."""
    path = Path(data)
    if matches(path) is not None:
        return next(above for above in path.parents if not (_RANGE.search(str(above)) or _WILD.search(str(above))))
    return path


def _expand(pattern: str) -> Iterator[str]:
    """Every path of a pattern with {000..146} or {a,b}."""
    queue, made = [pattern], 0
    while queue:
        text = queue.pop(0)
        match = _RANGE.search(text)
        if match is None:
            yield text
            continue
        first, last, words = match.groups()
        width = len(first) if first and first[0] == "0" else 1
        made += 1 if words is not None else abs(int(last) - int(first)) + 1
        if made > _MOST:
            raise DataError(f"{pattern} names too many shards", f"they are more than {_MOST}", "check the pattern")
        choices = words.split(",") if words is not None else [f"{i:0{width}}" for i in range(int(first), int(last) + 1)]
        queue += [text[: match.start()] + choice + text[match.end() :] for choice in choices]


def split_path(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """``SHARD.tar/NAME`` -> the shard and the name in it; None if the path lies in no shard."""
    text = os.fspath(path)
    for match in re.finditer(re.escape(SUFFIX + os.sep), text):
        shard = text[: match.end() - 1]
        if os.path.isfile(shard):
            return shard, text[match.end() :].replace(os.sep, "/")
    return None


def read_shard(path: str) -> Shard:
    """The index of a shard: in memory, else beside it (``.NAME.tar.index``), else made and written there if possible.

    Raises:
        DataError: it cannot be read, is damaged or compressed, or holds no end (a copy that has not finished).
    """
    try:
        about = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}", str(error.strerror), "check the path") from error
    return _read_shard(path, about.st_size, about.st_mtime_ns)


@functools.cache
def _read_shard(path: str, size: int, mtime_ns: int) -> Shard:
    folder, name = os.path.split(path)
    index = Path(folder, f".{name}.index")
    with suppress(DataError, OSError, OverflowError):  # missing, damaged, another's: it is made again
        stored = read_json(index, ShardIndex)
        if stored["stamp"] == f"{size} {mtime_ns}":
            names = stored["names"]
            offsets, sizes = array("Q", stored["offsets"]), array("Q", stored["sizes"])
            if len(names) == len(offsets) == len(sizes) and names == sorted(set(names)) and _inside(names):
                return Shard(path, size, mtime_ns, names, offsets, sizes, stored["passed"])
    found, passed = _scan(path, size)
    names = sorted(found)
    offsets, sizes = (array("Q", [found[name][i] for name in names]) for i in (0, 1))
    lists: dict[str, Any] = dict(names=names, offsets=offsets.tolist(), sizes=sizes.tolist())
    with suppress(TinyMIMError):  # a place that is only read
        write_json(index, dict(stamp=f"{size} {mtime_ns}", passed=passed, **lists))
    return Shard(path, size, mtime_ns, names, offsets, sizes, passed)


def _scan(path: str, size: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> first byte and bytes of every regular file of a tar; and how many members are left out."""
    found: dict[str, tuple[int, int]] = {}
    passed = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else a tar of a million photos is kept in memory
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or not _inside([name]):
                    passed += 1
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{name} ends after the file does")
                found[name] = member.offset_data, member.size
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"a tar ends in zeros; this one does not, at byte {end}")
    except Exception as error:  # tarfile raises many kinds on damaged headers
        raise DataError(
            f"the shard {path} is damaged", str(error) or type(error).__name__, "copy it again, or remove it"
        ) from error
    return found, passed


def _inside(names: Iterable[str]) -> bool:
    """Whether names are plain relative paths, so that ``SHARD.tar/NAME`` is theirs alone."""
    return all(
        0 < len(name) <= 4096 and "\0" not in name and not {"", ".", ".."} & set(name.split("/")) for name in names
    )


def shard_names(shards: Iterable[str], suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, shard) of every file whose name ends in ``suffixes`` (in lower case) and is not hidden, in no order.

    Raises:
        DataError: see :func:`read_shard`.
    """
    return [
        (name, shard)
        for shard in shards
        for name in read_shard(shard).names
        if name.lower().endswith(suffixes) and not any(part[0] == "." for part in name.split("/"))
    ]


def read_file(path: str | Path) -> bytes:
    """The bytes of a file in a folder or in a shard.

    Raises:
        OSError: it cannot be read.
        DataError: its shard is damaged.
    """
    try:
        return Path(path).read_bytes()
    except (NotADirectoryError, FileNotFoundError):
        if (where := split_path(path)) is None:
            raise
    return read_shard(where[0]).read(where[1])


def file_bytes(path: str | os.PathLike[str]) -> int:
    """The number of bytes of a file in a folder or in a shard.

    Raises:
        OSError: there is none.
        DataError: its shard is damaged.
    """
    try:
        return os.path.getsize(path)
    except (NotADirectoryError, FileNotFoundError):
        if (where := split_path(path)) is None:
            raise
    shard = read_shard(where[0])
    return shard.sizes[shard.find(where[1])]
