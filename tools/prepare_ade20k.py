#!/usr/bin/env python
"""Download ADE20K (SceneParse150, 0.9 GB), verify its checksum, unpack it and check the layout."""

import argparse
import hashlib
import http.client
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tinymim.cli import run_command
from tinymim.data.folders import Layout, read_layout
from tinymim.errors import DataError
from tinymim.files import atomic_path
from tinymim.progress import Progress

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
NAME = "ADEChallengeData2016"
COUNTS = {"train": 20210, "val": 2000}
CHUNK = 1 << 20


def check(folder: Path) -> Layout:
    """Check a folder for ADE20K: layout, 150 classes, number of pairs.

    Raises:
        DataError: something is missing.
    """
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
        DataError: offline, or another file came.
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
        _verify(part, sha1, url)


def _verify(path: Path, sha1: str, source: str) -> None:
    if (found := sha1_of(path)) != sha1:
        raise DataError(
            f"{source} is not the file expected",
            f"its sha1 is {found}, not {sha1}: a broken download or another file",
            "remove it and run this command again",
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack to ``folder``; it appears only when it is whole."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool."""
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help=f"{NAME} is put there")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check this folder")
    parser.add_argument("--keep-zip", action="store_true", help="keep the archive")
    parser.add_argument("--url", default=URL, help=argparse.SUPPRESS)
    parser.add_argument("--sha1", default=SHA1, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Download what is missing, check, print what to type next."""
    folder = args.check or args.out / NAME
    if args.check is None and not folder.exists():
        archive = args.out / f"{NAME}.zip"
        if archive.is_file():
            _verify(archive, args.sha1, str(archive))
        else:
            download(args.url, archive, args.sha1)
        unpack(archive, folder)
        if not args.keep_zip:
            archive.unlink()
    print(f"ok: {check(folder)}")
    print(
        f"next:    python tools/train_seg.py mmseg_configs/upernet_tinymim_b.py --data-root {folder} "
        "--student student.pth --work-dir runs/ade20k_b"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("prepare_ade20k.py", __doc__ or "", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
