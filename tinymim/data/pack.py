"""``tinymim data --pack``: the photos of a folder as .tar shards in WebDataset's convention, checked after writing.

The name of a photo in a shard is its path below the folder, so classes stay; photos follow each other in the order in
which the folder is read: a run on the shards sees what a run on the folder sees. Storage that is slow to open or list
many small files (network drives, object stores) serves a few large ones far faster.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinymim.cores import cores
from tinymim.data.photo_files import list_photos, packed, photo_names
from tinymim.data.pixels import UnreadablePhoto, open_photo, photo_size
from tinymim.data.shards import LARGEST, SUFFIX, file_bytes, matches, read_file, read_shard
from tinymim.errors import ConfigError, DataError
from tinymim.files import atomic_path, file_error
from tinymim.folders import hold
from tinymim.progress import Progress

MAX_SIZE, QUALITY = 512 * 10**6, 90
_AT_ONCE = 64  # photos in memory
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` wrote.

    Attributes:
        out: The folder of shards.
        shards: How many.
        photos: Photos in them.
        read: Bytes of the photos in the folder.
        written: Bytes of the shards.
        left_out: Photos that could not be read, which only re-encoding finds.
    """

    out: Path
    shards: int
    photos: int
    read: int
    written: int
    left_out: list[str]


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    max_size: int = MAX_SIZE,
    img_size: int | None = None,
    quality: int = QUALITY,
) -> Packed:
    """Write the photos of a folder as shards; the folder ``out`` appears when all are written and have been read back.

    Args:
        folder: Photos, also as shards.
        out: A new folder.
        max_size: Most bytes of a shard; one photo may be larger.
        img_size: Photos with a longer side, in pixels, are made smaller and JPEGs; None: every file as it is.
        quality: Of these JPEGs, 1 to 100.

    Raises:
        ConfigError: ``out`` is there already or lies in ``folder``; sizes that are not possible.
        DataError: no photos, or one too large for a shard.
        TinyMIMError: the disk is full, or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    _check(folder, out, max_size, img_size, quality)
    photos = list_photos(folder, option="--pack")
    with _beside(out) as part, contextlib.ExitStack() as tar:
        writer = _Writer(part, max_size, tar)
        left_out, before = [], 0
        names = photo_names(folder, photos)
        progress = Progress("pack", len(photos))
        with ThreadPoolExecutor(cores()) as threads:
            for first in range(0, len(photos), _AT_ONCE):
                batch = photos[first : first + _AT_ONCE]
                files = threads.map(lambda path: _content(path, img_size, quality), batch)
                for path, (content, size, encoded) in zip(batch, files, strict=True):
                    before += size
                    if content is None:
                        left_out.append(str(path))
                    else:
                        writer.add(names[path], content, encoded)
                progress.update(first + len(batch))
        shards = writer.close()
        progress.close(f"{len(writer.digests)} photos in {len(shards)} shard(s)")
        if not writer.digests:
            raise DataError(f"no photo of {folder} can be read", f"{len(left_out)} are damaged", "check the folder")
        _verify(shards, writer.digests)
        written = sum(path.stat().st_size for path in shards)
        try:
            os.rename(part, out)
        except OSError as error:
            raise file_error(f"cannot write {out}", error) from error
    return Packed(out, len(shards), len(writer.digests), before, written, left_out)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` for the block, of this process alone; what a killed one left is removed."""
    part = out.with_name(f".{out.name}.part")
    try:
        with hold(part):
            shutil.rmtree(part / "shards", ignore_errors=True)
            try:
                yield part / "shards"
            finally:
                shutil.rmtree(part / "shards", ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # held by another process
            part.rmdir()


def _check(folder: Path, out: Path, max_size: int, img_size: int | None, quality: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        free = next(name for i in range(2, 10_000) if not (name := out.with_name(f"{out.name}-{i}")).exists())
        raise ConfigError(f"{out} is there already", "shards are written to a new folder", f"use --out {free}")
    if packed(folder) is None and matches(folder) is None and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} is inside {folder}", "it would lie among the photos", "choose a folder next to it")
    if max_size < 1:
        raise ConfigError(f"--max-size {max_size}", "a shard has bytes", "e.g. --max-size 512MB")
    if img_size is not None and img_size < 16:
        raise ConfigError(f"--img-size {img_size}", "photos of at least 16 pixels are useful", "e.g. --img-size 512")
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality {quality}", "JPEG's goes from 1 to 100", f"e.g. --quality {QUALITY}")


def _content(path: Path, img_size: int | None, quality: int) -> tuple[bytes | None, int, bool]:
    """A photo's bytes (None: it cannot be read), how many it had, and whether they are a JPEG made here."""
    try:
        size = file_bytes(path)
        if size > LARGEST:
            raise DataError(f"{path} has {size} bytes", f"a photo in a shard has at most {LARGEST}", "remove it")
        if img_size is None:
            return read_file(path), size, False
        width, height = photo_size(path)
        share = img_size / max(width, height)
        if share >= 1:
            return read_file(path), size, False
        smaller = max(round(width * share), 1), max(round(height * share), 1)
        image = open_photo(path, at_least=(max(smaller), max(smaller)))
    except UnreadablePhoto:
        return None, size, False
    except OSError as error:
        raise file_error(f"cannot read {path}", error) from error
    file = io.BytesIO()
    image.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0).save(file, "JPEG", quality=quality)
    return file.getvalue(), size, True


class _Writer:
    """Writes photos into one shard after the other.

    Args:
        folder: Folder of the shards.
        max_size: Most bytes of one.
        held: Holds the shard that is open.

    Attributes:
        digests: Name -> sha256 of what was written.
    """

    def __init__(self, folder: Path, max_size: int, held: contextlib.ExitStack) -> None:
        self.folder, self.max_size, self.held = folder, max_size, held
        self.digests: dict[str, bytes] = {}
        self.shards: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, name: str, content: bytes, encoded: bool) -> None:
        if encoded and not name.lower().endswith(_JPEG):
            name += ".jpg"
        while name in self.digests:
            name += ".jpg"
        self.digests[name] = hashlib.sha256(content).digest()
        if self.tar is not None and self.tar.offset + len(content) + 2048 > self.max_size:
            self.close()
        if self.tar is None:
            self.shards.append(self.folder / f"photos-{len(self.shards):05d}{SUFFIX}")
            self.tar = self.held.enter_context(_new_tar(self.shards[-1]))
        member = tarfile.TarInfo(name)  # no dates or owners: the same photos give the same bytes
        member.size, member.mode = len(content), 0o644
        self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> list[Path]:
        """Finish the shard that is open; return all of them."""
        self.held.close()
        self.tar = None
        return self.shards


@contextlib.contextmanager
def _new_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with (
        atomic_path(path) as part,
        tarfile.open(part, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar,
    ):
        yield tar


def _verify(shards: list[Path], digests: dict[str, bytes]) -> None:
    """Read every photo back, through the index that runs will use.

    Raises:
        DataError: one is missing or other bytes than were written.
    """
    found: dict[str, bytes] = {}
    for path in shards:
        shard = read_shard(str(path))
        found |= {name: hashlib.sha256(shard.read(name)).digest() for name in shard.names}
    if wrong := sorted(name for name in {*digests, *found} if digests.get(name) != found.get(name)):
        raise DataError(
            f"{wrong[0]} is not in the shards as it was written",
            f"{len(wrong)} of {len(digests)} photos differ: the disk or its memory is failing",
            "run the command again, with --out on another disk",
        )
