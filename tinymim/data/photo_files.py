"""Which files of a folder are photos: the one lister of every command. Standard library only.

Folders that are links are followed, each folder once, so that loops end. Hidden names are passed over, and so are the
label maps of a labelled folder (``annotations/`` beside ``images/``). Only regular files count: nothing is opened. What
looks like a photo and is left out is told in one line.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Collection
from pathlib import Path

from tinymim.errors import DataError
from tinymim.files import writable

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # in any case
UNREAD = (".avif", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl")  # pictures that are left out, which is told
IMAGES, LABELS = "images", "annotations"


def list_photos(
    folder: str | Path, *, option: str = "--data", what: str = "photos", labels: bool = False
) -> list[Path]:
    """Every photo below a folder, sorted; what is passed over is told.

    Args:
        folder: The folder.
        option: How the command calls it, for the error.
        what: What the photos are for, in the same error: "calibration photos".
        labels: Also the label maps of labelled folders.

    Raises:
        DataError: no such folder, one that cannot be read or holds label maps, or no photo in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}", f"{option} must name a folder of photos", "check the path")
    if not labels:
        _refuse_labels(folder, option)
    photos = sorted(map(Path, photo_paths(folder, labels=labels)))
    if not photos:
        raise DataError(
            f"no {what} in {folder}",
            f"nothing below it ends in {', '.join(SUFFIXES)}",
            "give the folder that holds the photos (folders inside it are searched)",
        )
    return photos


def photo_paths(folder: str | Path, suffixes: Collection[str] = SUFFIXES, *, labels: bool = False) -> list[str]:
    """Paths of the files below a folder that end in ``suffixes``, in no order; what is passed over is told.

    Args:
        folder: The folder; the paths start with it as it is given.
        suffixes: In lower case.
        labels: Also the label maps of labelled folders.

    Raises:
        DataError: the folder cannot be read.
    """
    top, found = os.fspath(folder), list[str]()
    passed: dict[str, list[str]] = {}
    visited = set[str]()
    folders, links = [top], list[str]()
    while folders or links:
        at = folders.pop() if folders else links.pop(0)  # links last: a photo keeps the name it really has
        try:
            with os.scandir(at) as inside:
                entries = sorted((entry for entry in inside if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            why = error.strerror or str(error)
            if at == top:
                raise DataError(f"cannot read the folder {top}", why, "check its permissions") from error
            passed.setdefault(f"folders that cannot be read ({why})", []).append(at)
            continue
        real = os.path.realpath(at)
        if real in visited:
            passed.setdefault("links to folders that are searched already", []).append(at)
            continue
        visited.add(real)
        below = {entry.name: entry for entry in entries if _is(entry.is_dir)}
        if not labels and {IMAGES, LABELS} <= set(below):
            passed.setdefault("label maps", []).append(below.pop(LABELS).path)
        for entry in below.values():
            (links if entry.is_symlink() else folders).append(entry.path)
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix not in suffixes or _is(entry.is_dir):
                if suffix in UNREAD and suffixes is SUFFIXES:
                    passed.setdefault(f"{suffix} files, which are not read", []).append(entry.path)
            elif _is(entry.is_file):
                found.append(entry.path)
            else:
                passed.setdefault("broken links, or no regular files", []).append(entry.path)
    for why, paths in passed.items():
        some = ", ".join(os.path.relpath(path, top) for path in sorted(paths)[:3])
        tell(f"{top}: passed over {why}: {some}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""))
    return found


def subfolders(folder: str | Path) -> list[str]:
    """Names of the direct sub-folders, links to folders included, sorted, without hidden ones.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.name[0] != "." and _is(entry.is_dir))
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(f"cannot read the folder {folder}", why, "check the path and its permissions") from error


@functools.cache
def tell(text: str) -> None:
    """Print a remark about the data once: of several processes on the first, of data workers in the first, too."""
    if int(os.environ.get("RANK", 0)) == 0 and multiprocessing.current_process().name.endswith(("MainProcess", "-1")):
        print(f"note: {writable(text)}", flush=True)


def _is(test: Callable[[], bool]) -> bool:
    """Whether a directory entry is of a kind; a link that leads nowhere, or to itself, is of none."""
    try:
        return test()
    except OSError:
        return False


def _refuse_labels(folder: Path, option: str) -> None:
    """Refuse a folder that is the label side of a labelled folder, or lies in it."""
    real = folder.resolve()
    for above in (real, *real.parents):
        photos = above.parent / IMAGES / real.relative_to(above)
        if above.name == LABELS and photos.is_dir():
            raise DataError(
                f"{folder} holds label maps", "label maps are no photos", f"give the photos: {option} {photos}"
            )
