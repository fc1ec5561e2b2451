"""TinyViT's published format (github.com/microsoft/Cream, TinyViT), read and written.

``logits_top{K}_epoch{E}/rank{r}-keys.txt`` has a key a line, ``rank{r}-values.bin`` a record of 4 + 4K bytes for each,
in that order: int32 seed, int16 ids by falling probability, their float16 probabilities; little-endian, no header, no
checksum, neither K nor the teacher. ``tinymim.json`` beside the folders, which only we write and read, has our header.

Legend: R = records, K = classes that are kept.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, DataError
from tinymim.files import atomic_folder, write_json
from tinymim.folders import hold
from tinymim.progress import Progress
from tinymim.records import TargetHeader
from tinymim.schema import read_json
from tinymim.store.layout import identity, logits_arrays
from tinymim.store.targets import TargetStore, missing_chunks
from tinymim.store.writer import TargetWriter

SIDECAR = "tinymim.json"
MOST_CLASSES = 2**15  # that int16 ids can name
FOREIGN = {"kind": "TinyViT's published augmentation"}  # of views that only their program makes again


def record_type(topk: int) -> np.dtype:
    """A record as numpy reads it; ids without sign, as those beyond int16 have wrapped around."""
    return np.dtype([("seed", "<i4"), ("indices", "<u2", (topk,)), ("values", "<f2", (topk,))])


def write_official(url: str | os.PathLike[str], folder: str | Path) -> list[Path]:
    """Write a store of sparse logits as such files, all records as rank 0's.

    Args:
        url: The store.
        folder: Where the folders of the epochs go; those that are there and whole are kept, so that it can be repeated.

    Returns:
        The folders.

    Raises:
        DataError: the store is damaged or not complete.
        ConfigError: it holds other targets, more classes than int16 ids can name, or keys with line breaks.
        TinyMIMError: the disk is full.
    """
    store = TargetStore.open(url)
    header, layout, folder = store.header, store.layout, Path(folder)
    topk = header.get("topk", 0)
    if layout.arrays != logits_arrays(topk):
        raise ConfigError(
            f"{url} holds {header['kind']}", "the format is for sparse logits only", "convert such a store"
        )
    if header.get("classes", 0) > MOST_CLASSES:
        raise ConfigError(
            f"{url} is of {header['classes']:,} classes",
            f"int16 ids name {MOST_CLASSES:,}",
            "the format cannot hold it",
        )
    keys = [*store.keys]
    if wrong := next((key for key in keys if re.search(r"[\r\n]", key)), None):
        raise ConfigError(f"the key {wrong!r}", "the format has one key a line", "rename the photo and cache it anew")
    with hold(folder, "--to-official"):
        old = _sidecar(folder)
        if _listed(folder) and (old is None or identity(old) != layout.identity):
            raise ConfigError(f"{folder} is not empty", f"it does not hold epochs of {url}", "use a new folder")
        for part in folder.glob(".logits_top*.part"):
            shutil.rmtree(part)
        write_json(folder / SIDECAR, header)
        made, progress = [], Progress("convert", layout.epochs)
        for epoch in range(layout.epochs):
            made.append(folder / f"logits_top{topk}_epoch{epoch}")
            if not made[-1].is_dir():
                with atomic_folder(made[-1]) as part:
                    _write_epoch(store, epoch, keys, part)
            progress.update(epoch + 1)
        progress.close()
    return made


def _write_epoch(store: TargetStore, epoch: int, keys: list[str], folder: Path) -> None:
    """Write the two files of rank 0; photos that could not be read are left out."""
    layout = store.layout
    with open(folder / "rank0-keys.txt", "wb") as names, open(folder / "rank0-values.bin", "wb") as values:
        for number in range(layout.chunks):
            chunk = layout.at(epoch, number)
            arrays, photos = store.read(chunk), layout.photos_of(chunk)
            readable = np.flatnonzero(arrays["seed"] >= 0)
            records = np.empty(len(readable), record_type(arrays["values"].shape[1]))
            for name in ("seed", "indices", "values"):
                records[name] = arrays[name][readable]
            values.write(records.tobytes())
            names.writelines(_encoded(keys[photos[row]]) + b"\n" for row in readable)


def read_official(
    folder: str | Path,
    out: str | os.PathLike[str],
    *,
    topk: int | None = None,
    classes: int | None = None,
    teacher: str | None = None,
    keys: Iterable[str] | None = None,
    keep_first: bool = False,
) -> None:
    """Make a store of such files.

    Args:
        folder: Where the folders of the epochs lie.
        out: The store; one that was begun is continued.
        topk: K, if the folders' names are not to be trusted.
        classes: Of the teacher; None: as :data:`SIDECAR` says.
        teacher: Its name; None: the same, or "unknown".
        keys: Of the photos that must be those of the files; None: not compared.
        keep_first: Of a key on two ranks, which the padding of a sampler causes, take the lower rank's.

    Raises:
        DataError: a file is missing or cut off, K or classes are others, a key occurs twice, or the keys are not those
            of the photos or not the same in every epoch.
        ConfigError: the classes are not known; ``out`` holds another store.
    """
    folder = Path(folder)
    header, found = _sidecar(folder), _epochs(folder, topk)
    topk = found[0][0]
    if classes is None:
        if header is None or "classes" not in header:
            fix = "add --classes N, e.g. 21841 for TinyViT's ImageNet-22k"
            raise ConfigError(f"{folder} does not say how many classes its teacher has", "its format does not", fix)
        classes = header["classes"]
    for _, each in found:  # all of them before work starts
        _ranks(each, topk)
    now = _Epoch(found[0][1], topk, classes, keep_first)
    if keys is not None:
        _same_keys(now.keys, sorted(map(_encoded, keys)), str(folder), "--data")
    about: dict[str, Any] = {
        "teacher": {"name": teacher or "unknown", "sha256": None},
        "topk": topk,
        "classes": classes,
        "augmentation": FOREIGN,
        "precision": "unknown",
    }
    if header is not None:
        about = {key: value for key, value in header.items() if key in (*about, "data")}
    with TargetWriter(
        out,
        (key.decode("utf-8", "surrogateescape") for key in now.keys),
        arrays=logits_arrays(topk),
        epochs=len(found),
        seed=header["seed"] if header else 0,
        pairs=header["pairs"] if header else False,
        chunk=header["chunk"] if header else None,
        about=about,
    ) as writer:
        first, total = now.keys, len(missing_chunks(writer.place, writer.layout))
        progress, at = Progress("convert", total), 0
        for done, chunk in enumerate(writer.work(), 1):
            if chunk.epoch != at:
                at, now = chunk.epoch, _Epoch(found[chunk.epoch][1], topk, classes, keep_first)
                _same_keys(now.keys, first, str(found[at][1]), str(found[0][1]))
            rows = now.records(writer.layout.photos_of(chunk))
            writer.write(chunk, {name: rows[name] for name in ("seed", "values", "indices")})
            progress.update(done)
        progress.close()


def _sidecar(folder: Path) -> TargetHeader | None:
    return read_json(folder / SIDECAR, TargetHeader) if (folder / SIDECAR).is_file() else None


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _epochs(folder: Path, topk: int | None) -> list[tuple[int, Path]]:
    """(K, folder) of every epoch, in order.

    Raises:
        DataError: there are none, one is missing, or they are of different K.
    """
    matches = [(re.fullmatch(r"logits_top(\d{1,5})_epoch(\d{1,6})", path.name), path) for path in _listed(folder)]
    found = sorted((int(match[2]), int(match[1]), path) for match, path in matches if match)
    if not found:
        fix = "give the folder that holds logits_topK_epochE"
        raise DataError(f"no stored logits in {folder}", "no folder in it is called logits_topK_epochE", fix)
    numbers, counts = [number for number, _, _ in found], {count for _, count, _ in found}
    if len(counts) > 1 or (topk is not None and counts != {topk}):
        wanted = "one K" if topk is None else f"K {topk}"
        why = f"the folders are of K {', '.join(map(str, sorted(counts)))}, not of {wanted}"
        raise DataError(f"{folder} is of another K", why, "give --topk as it was written, or separate the folders")
    if numbers != [*range(len(numbers))]:
        missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
        why = f"the folder of epoch {missing} is missing"
        raise DataError(f"{folder} is not complete", why, "copy every epoch, from 0 on")
    return [(count, path) for _, count, path in found]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        raise DataError(f"cannot read {folder}", error.strerror or str(error), "check the path") from None


def _ranks(folder: Path, topk: int) -> range:
    """The ranks of an epoch, from what its files are called and how large they are.

    Raises:
        DataError: a file is missing, or one of values is no whole number of records.
    """
    names = {path.name for path in _listed(folder)}
    found = [match for name in names if (match := re.fullmatch(r"rank(\d{1,6})-(keys\.txt|values\.bin)", name))]
    ranks = range(max((int(match[1]) for match in found), default=0) + 1)
    for rank in ranks:
        for name in (f"rank{rank}-keys.txt", f"rank{rank}-values.bin"):
            if name not in names:
                why = "its records would be lost"
                raise DataError(f"{folder / name} is missing", why, "copy the files of every rank")
        if over := (size := (folder / name).stat().st_size) % record_type(topk).itemsize:
            why = f"a record of K {topk} has {record_type(topk).itemsize}, and {over} are over"
            raise DataError(f"{folder / name} has {size:,} bytes", why, "copy it again: it is cut off, or of another K")
    return ranks


class _Epoch:
    """The records of all ranks of an epoch, in the order of their keys; they stay in their files.

    Attributes:
        keys: Sorted.

    Raises:
        DataError: see :func:`read_official`.
    """

    def __init__(self, folder: Path, topk: int, classes: int, keep_first: bool) -> None:
        ranks = _ranks(folder, topk)
        self._ranks: list[np.ndarray] = []
        place: dict[bytes, tuple[int, int]] = {}  # key -> rank and row
        for rank in ranks:
            keys, records = _read_rank(folder, rank, topk, classes)
            self._ranks.append(records)
            for row, key in enumerate(keys):
                if (other := place.setdefault(key, (rank, row))) != (rank, row) and (
                    other[0] == rank or not keep_first
                ):
                    raise DataError(
                        f"{key.decode('utf-8', 'replace')!r} occurs twice in {folder}",
                        f"rank {other[0]} holds it in row {other[1]}, rank {rank} in row {row}",
                        "if a sampler has padded its last batch, add --keep-first; else restore the files from a copy",
                    )
        self.keys = sorted(place)
        self._places = np.array([place[key] for key in self.keys], np.int64).reshape(-1, 2)

    def records(self, positions: np.ndarray) -> np.ndarray:
        """Records (R,) of photos, given by their positions in :attr:`keys`."""
        out = np.empty(len(positions), self._ranks[0].dtype)
        places = self._places[positions]
        for rank, records in enumerate(self._ranks):
            here = places[:, 0] == rank
            out[here] = records[places[here, 1]]
        return out


def _read_rank(folder: Path, rank: int, topk: int, classes: int) -> tuple[list[bytes], np.ndarray]:
    """Keys and mapped records of one rank, checked."""
    names, values = folder / f"rank{rank}-keys.txt", folder / f"rank{rank}-values.bin"
    keys = [line.rstrip(b"\r") for line in names.read_bytes().split(b"\n") if line.rstrip(b"\r")]
    size, kind = values.stat().st_size, record_type(topk)
    if size != len(keys) * kind.itemsize:
        fits, over = divmod(size - 4 * len(keys), 4 * len(keys)) if keys else (0, 1)
        hint = f"; they would fit K {fits}" if not over and fits > 0 else ""
        raise DataError(
            f"{values} has {size:,} bytes",
            f"{len(keys):,} keys of K {topk} take {len(keys) * kind.itemsize:,}{hint}",
            "copy the file again: it is cut off, or of another K",
        )
    records = np.memmap(values, kind, "r") if keys else np.empty(0, kind)
    for at in range(0, len(records), 2**16):
        some = records[at : at + 2**16]
        p_RK = some["values"].astype(np.float32)
        if (largest := int(some["indices"].max())) >= classes:
            raise DataError(f"{values} names the class {largest:,}", f"there are {classes:,}", "check --classes, and K")
        if not (
            np.isfinite(p_RK).all() and (p_RK >= 0).all() and (p_RK.sum(1) < 1.01).all() and (some["seed"] >= 0).all()
        ):
            why = "a record has a negative number, NaN, or a sum above 1"
            raise DataError(f"{values} holds no probabilities", why, "check K, and copy the file again")
    return keys, records


def _same_keys(found: list[bytes], wanted: list[bytes], source: str, other: str) -> None:
    if found != wanted:
        alone = sorted({*found} ^ {*wanted})[0]
        where, lacking = (source, other) if alone in {*found} else (other, source)
        raise DataError(
            f"{source} is of other photos than {other}",
            f"{alone.decode('utf-8', 'replace')!r} is in {where} and not in {lacking}",
            "give what belongs together, or copy the missing files",
        )
