"""ADE20K's release (SceneParse150, 0.9 GB): download, checksum, unpacking, and a check of the layout."""

import hashlib
import http.client
import shutil
import urllib.request
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinymim.errors import DataError
from tinymim.files import atomic_path
from tinymim.progress import Progress

if TYPE_CHECKING:
    from tinymim.data.folders import Layout

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
NAME = "ADEChallengeData2016"
COUNTS = {"train": 20210, "val": 2000}
CHUNK = 1 << 20


def check(folder: Path) -> "Layout":
    """Check a folder for ADE20K: layout, 150 classes, number of pairs.

    Raises:
        DataError: something is missing.
    """
    from tinymim.data.folders import read_layout

    if not (folder / "annotations").is_dir() and (folder / "images").is_dir():
        raise DataError(
            f"{folder} has no annotations folder",
            "this looks like the full ADE20K release, whose labels are in another format",
            f"download the SceneParse150 release: {URL}",
        )
    layout = read_layout(folder)
    if layout.source != "ade20k":
        raise DataError(
            f"{folder} is a labelled folder, but not ADE20K",
            f"it was read from {layout.source} and has {len(layout.classes)} classes",
            "give the folder ADEChallengeData2016; other folders need no preparation",
        )
    found = {split: len(getattr(layout, split)) for split in COUNTS}
    if found != COUNTS:
        raise DataError(
            f"{folder} has {found['train']} training and {found['val']} validation pairs",
            f"the release has {COUNTS['train']} and {COUNTS['val']}: part of it is missing",
            "unpack the archive again (remove the folder and run this tool without --check)",
        )
    return layout


def sha1_of(path: Path) -> str:
    """Hex sha1 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def download(url: str, path: Path, sha1: str) -> None:
    """Fetch ``url``; ``path`` exists afterwards only if the checksum is right.

    Raises:
        DataError: offline, or the checksum is wrong.
    """

    def offline(error: Exception) -> DataError:
        return DataError(
            f"cannot download {url}",
            str(error),
            f"on a machine with network: wget {url}; copy the file to {path}; run this command again",
        )

    with atomic_path(path) as part:
        try:
            source = urllib.request.urlopen(url, timeout=60)
        except (OSError, ValueError) as error:
            raise offline(error) from error
        with source, open(part, "wb") as target:
            total = max(int(source.headers.get("Content-Length") or 0) // CHUNK, 1)
            progress, done = Progress("download (MiB)", total), 0
            while True:
                try:
                    chunk = source.read(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise offline(error) from error
                if not chunk:
                    break
                target.write(chunk)
                done += len(chunk)
                progress.update(min(done // CHUNK, total))
            progress.close(f"{done / CHUNK:.1f} MiB")
        verify(part, sha1, url)


def verify(path: Path, sha1: str, source: str) -> None:
    """Check the sha1 of a file; ``source`` names it in the message.

    Raises:
        DataError: the sha1 differs.
    """
    if (found := sha1_of(path)) != sha1:
        raise DataError(
            f"{source} is not the expected file",
            f"its sha1 is {found}, not {sha1}: a broken download or another file",
            "remove it and run this command again",
        )


def prepare(out: Path, *, url: str = URL, sha1: str = SHA1, keep_zip: bool = False) -> Path:
    """The folder ADEChallengeData2016 in ``out``, downloaded and unpacked if it is missing; not checked here.

    Raises:
        DataError: see :func:`download`, :func:`verify` and :func:`unpack`.
    """
    folder, archive = out / NAME, out / f"{NAME}.zip"
    if not folder.exists():
        if archive.is_file():
            verify(archive, sha1, str(archive))
        else:
            download(url, archive, sha1)
        unpack(archive, folder)
        if not keep_zip:
            archive.unlink()
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack to ``folder``; it appears only when it is whole.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            progress = Progress("unpack (files)", len(names))
            for i, name in enumerate(names):
                file.extract(name, part)
                progress.update(i + 1)
            progress.close(f"{len(names)} files")
        (part / folder.name).rename(folder)
    except OSError as error:
        raise DataError(f"cannot unpack {archive}", str(error), "free 3 GB and run this command again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
