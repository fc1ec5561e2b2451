"""Which files of a folder, or of .tar shards, are photos: the one lister of every command. Standard library only.

Folders that are links are followed, each folder once, so that loops end. Hidden names are passed over, and so are the
label maps of a labelled folder (``annotations/`` beside ``images/``). Only regular files count: nothing is opened. What
looks like a photo and is left out is told in one line.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from tinymim.data.shards import COMPRESSED, base, find_shards, matches, read_shard, shard_names, split_path
from tinymim.errors import DataError
from tinymim.files import writable
from tinymim.progress import say

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # in any case
UNREAD = (".avif", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tar")  # left out, which is told
IMAGES, LABELS = "images", "annotations"
FEW_PHOTOS = 20_000  # up to which the recipe for small data is proposed


def list_photos(
    folder: str | Path, *, option: str = "--data", what: str = "photos", labels: bool = False, shards: bool = True
) -> list[Path]:
    """Every photo below a folder, or in the shards that it names, sorted; what is passed over is told.

    Photos of shards are sorted by their names in them, so that packed photos have the order of their folder.

    Args:
        folder: The folder; what :func:`tinymim.data.shards.find_shards` takes; or a pattern of photos and folders
            (:func:`tinymim.data.shards.matches`).
        option: How the command calls it, for the error.
        what: What the photos are for, in the same error: "calibration photos".
        labels: Also the label maps of labelled folders.
        shards: Whether the command reads shards.

    Raises:
        DataError: no such folder, one that cannot be read or holds label maps, or no photo in it; a damaged shard.
    """
    folder = Path(folder)
    if (tars := packed(folder)) is not None:
        if not shards:
            raise DataError(
                f"{folder} holds shards", f"{option} reads photos in folders", "unpack them: tar -xf SHARD.tar"
            )
        return [Path(f"{tar}{os.sep}{name}") for name, tar in _photos_of(tars, folder, what)]
    if (named := matches(folder)) is not None:
        photos = _named(named, folder, option, labels)
    elif not folder.is_dir():
        raise DataError(f"no folder at {folder}", f"{option} must name a folder of photos", "check the path")
    else:
        if not labels:
            _refuse_labels(folder, option)
        photos = sorted(map(Path, photo_paths(folder, labels=labels)))
    if not photos:
        inside = [] if named is not None else sorted(folder.iterdir())
        zipped = next((path.name for path in inside if path.name.endswith(COMPRESSED)), None)
        raise DataError(
            f"no {what} in {folder}",
            f"nothing below it ends in {', '.join(SUFFIXES)}",
            f"{zipped} is compressed: shards are read in place as plain .tar (gunzip them)"
            if zipped
            else "give the folder that holds the photos (folders inside it are searched), or .tar shards",
        )
    return photos


def _named(named: list[str], pattern: Path, option: str, labels: bool) -> list[Path]:
    """Photos that a pattern names, and those in folders that it names, sorted."""
    if missing := [path for path in named if not os.path.exists(path)] or ([] if named else [str(pattern)]):
        raise DataError(
            f"nothing at {missing[0]}",
            f"{option} {pattern} names photos and folders by {{000..146}}, {{a,b}}, * and ?",
            "check the pattern, and quote it: the shell would replace it",
        )
    photos = [path for path in named if os.path.splitext(path)[1].lower() in SUFFIXES and os.path.isfile(path)]
    for path in filter(os.path.isdir, named):
        if not labels:
            _refuse_labels(Path(path), option)
        photos += photo_paths(path, labels=labels)
    return sorted(map(Path, dict.fromkeys(photos)))


def photo_names(folder: str | Path, photos: Sequence[Path]) -> dict[Path, str]:
    """Photo -> its path below the folder that ``--data`` names, with ``/``; of shards its name in its shard."""
    if packed(folder) is None:
        return {path: path.relative_to(base(folder)).as_posix() for path in photos}
    return {path: where[1] for path in photos if (where := split_path(path))}


def packed(folder: str | Path) -> list[str] | None:
    """The shards that a ``--data`` names, sorted; None if it is a folder of photos, or nothing.

    Raises:
        DataError: a shard of a pattern is missing.
    """
    return find_shards(folder, SUFFIXES)


def packed_classes(shards: list[str], folder: str | Path) -> dict[str, list[Path]]:
    """Class -> photos, sorted, of shards whose names begin with the class as packed class folders do.

    Where no photo lies in a folder the class is what WebDataset's ``NAME.cls`` beside ``NAME.jpg`` holds, in the order
    of the numbers if all are numbers.

    Raises:
        DataError: a damaged shard, no photos, or a photo without a class.
    """
    found: dict[str, list[Path]] = {}
    photos = _photos_of(shards, Path(folder), "photos")
    inside = any("/" in name for name, _ in photos)
    for name, shard in sorted(photos):
        if not inside:
            beside = name.split(".")[0] + ".cls"
            try:
                if not (kind := read_shard(shard).read(beside)[:256].decode().strip()):
                    raise ValueError("it is empty")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{shard} does not say the class of {name}",
                    f"it is in no folder there, and {beside} cannot be read ({error})",
                    "pack class folders with tinymim data --pack, or write NAME.cls beside NAME.jpg",
                ) from None
        elif "/" in name:
            kind = name.split("/")[0]
        else:
            continue  # as files beside class folders
        found.setdefault(kind, []).append(Path(f"{shard}{os.sep}{name}"))
    numbers = not inside and all(kind.isdecimal() for kind in found)
    return {kind: found[kind] for kind in sorted(found, key=lambda kind: (int(kind) if numbers else 0, kind))}


def _photos_of(shards: list[str], folder: Path, what: str) -> list[tuple[str, str]]:
    """(name, shard) of every photo in shards, in the order of :func:`list_photos`; what is passed over is told."""
    names = sorted(shard_names(shards, SUFFIXES), key=lambda found: (PurePosixPath(found[0]), found[1]))
    if passed := sum(read_shard(shard).passed for shard in shards):
        tell(f"{folder}: passed over {passed} members of shards that are links, or have no plain relative name")
    if not names:
        raise DataError(
            f"no {what} in the {len(shards)} shard(s) of {folder}",
            f"no name in them ends in {', '.join(SUFFIXES)}",
            "check that these are shards of photos",
        )
    return names


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


_listening: list[list[str]] = []


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """Remarks about the data that the block makes, in place of printing them."""
    remarks: list[str] = []
    _listening.append(remarks)
    try:
        yield remarks
    finally:
        _listening.pop()


def tell(text: str) -> None:
    """Print a remark about the data once: of several processes on the first, of data workers in the first, too."""
    if not _listening:
        print_once(text)
    elif text not in _listening[-1]:
        _listening[-1].append(text)


@functools.cache
def print_once(text: str) -> None:
    """What :func:`tell` does unless somebody listens."""
    if int(os.environ.get("RANK", 0)) == 0 and multiprocessing.current_process().name.endswith(("MainProcess", "-1")):
        say(f"note: {writable(text)}")


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
