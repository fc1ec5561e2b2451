"""Folders of sequences, LaSOT's and flat ones, checked whole before any work. Standard library, numpy and Pillow.

A sequence is a folder with ``img`` (frames, in the order of the numbers in their names) and ``groundtruth.txt`` (a line
``x,y,w,h`` per frame, pixels of the upright frame); ``full_occlusion.txt`` and ``out_of_view.txt`` (a 0 or 1 per frame)
mark frames without the target. A root holds sequences, or classes of sequences (``CLASS/CLASS-N``), or is one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinymim.data.photo_files import list_photos, subfolders
from tinymim.data.pixels import photo_size
from tinymim.errors import DataError
from tinymim.progress import Progress

FRAMES, TRUTH, ABSENT = "img", "groundtruth.txt", ("full_occlusion.txt", "out_of_view.txt")
LARGEST = 1 << 24  # bytes of a text file: LaSOT's longest has 11,397 lines


@dataclass
class Sequence:
    """A sequence with its truth.

    Attributes:
        name: Of its folder, below the root.
        frames: Files, in order.
        size: Width and height of every frame, pixels.
        truth: float64 (N, 4): x, y, width, height.
        visible: bool (N,): whether the target is in the frame.
    """

    name: str
    frames: list[Path]
    size: tuple[int, int]
    truth: np.ndarray
    visible: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)


def read_sequences(root: str | Path, *, option: str = "--data") -> list[Sequence]:
    """Every sequence below a root, sorted by name; of every frame the head is read.

    Args:
        root: The folder.
        option: How the command calls it, for errors.

    Raises:
        DataError: no sequence, or one without frames or truth, with more or fewer lines than frames, with a box that is
            none where the target is visible, or with frames of different sizes.
    """
    root = Path(root)
    folders = sequence_folders(root, option)
    found = []
    line = Progress("check sequences", len(folders))
    for done, folder in enumerate(folders, 1):
        found.append(_read(folder, str(folder.relative_to(root.parent if folder == root else root)), option))
        line.update(done)
    line.close(f"{len(found)} sequences, {sum(map(len, found)):,} frames")
    return found


def sequence_folders(root: Path, option: str) -> list[Path]:
    """The folders of a root that are sequences: those with ``img`` or ``groundtruth.txt``, one or two levels down.

    Raises:
        DataError: there is none.
    """
    if not root.is_dir():
        raise DataError(f"no folder at {root}", f"{option} must name a folder of sequences", "check the path")
    if _is_sequence(root):
        return [root]
    found: list[Path] = []
    for name in subfolders(root):
        inner = root / name
        found += [inner] if _is_sequence(inner) else [p for n in subfolders(inner) if _is_sequence(p := inner / n)]
    if not found:
        raise DataError(
            f"no sequence in {root}",
            f"no folder in it, or one level below, holds {FRAMES}/ or {TRUTH}",
            f"give LaSOT's folder, or one of NAME/{FRAMES}/00000001.jpg and NAME/{TRUTH}; "
            "to make one: tinymim track --generate FOLDER",
        )
    return sorted(found, key=lambda path: in_order(str(path)))


def _is_sequence(folder: Path) -> bool:
    return (folder / FRAMES).is_dir() or (folder / TRUTH).is_file()


def list_frames(folder: Path, option: str = "--data") -> list[Path]:
    """The photos of a folder in the order of the numbers in their names: 2.jpg before 10.jpg.

    Raises:
        DataError: no folder, or no photo in it.
    """
    return sorted(list_photos(folder, option=option, what="frames", shards=False), key=lambda p: in_order(str(p)))


def in_order(name: str) -> list[tuple[int, str]]:
    """The sorting key of a name with numbers in it."""
    return [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", name)]


def frames_size(frames: list[Path], where: Path) -> tuple[int, int]:
    """Width and height of all frames.

    Raises:
        DataError: they differ, or a frame cannot be read.
    """
    size = photo_size(frames[0])
    for frame in frames[1:]:
        if (other := photo_size(frame)) != size:
            raise DataError(
                f"the frames of {where} have different sizes",
                f"{frames[0].name} is {size[0]}x{size[1]}, {frame.name} is {other[0]}x{other[1]}",
                "boxes are pixels of one size: bring all frames to it, or make it two sequences",
            )
    return size


def _read(folder: Path, name: str, option: str) -> Sequence:
    """One sequence.

    Raises:
        DataError: see :func:`read_sequences`.
    """
    if not (folder / FRAMES).is_dir():
        raise DataError(
            f"{folder} has no frames", f"it holds {TRUTH} but no {FRAMES}/", f"put its frames into {folder / FRAMES}"
        )
    frames = list_frames(folder / FRAMES, option)
    if not (folder / TRUTH).is_file():
        raise DataError(
            f"{folder} has no {TRUTH}",
            "without true boxes nothing can be learned or scored on it",
            f"write one line x,y,w,h per frame; to follow a target without truth: "
            f"tinymim track TRACKER {folder / FRAMES} --box X Y W H",
        )
    truth = _boxes(folder / TRUTH)
    _same_length(folder / TRUTH, len(truth), frames)
    absent = np.zeros(len(frames), bool)
    for file in (folder / text for text in ABSENT):
        if file.is_file():
            flags = _flags(file)
            _same_length(file, len(flags), frames)
            absent |= flags
    wrong = ~(np.isfinite(truth).all(1) & (truth[:, 2:] > 0).all(1))
    if wrong[0] or absent[0]:
        why = "the target is marked as absent there" if absent[0] else f"it is {_spelled(truth[0])}"
        raise DataError(
            f"{folder} does not show its target in the first frame",
            f"a tracker starts from the first box of {TRUTH}, and {why}",
            "begin the sequence at a frame with the target, or correct the line",
        )
    if (bad := np.flatnonzero(wrong & ~absent)).size:
        raise DataError(
            f"line {bad[0] + 1} of {folder / TRUTH} is no box" + (f" ({bad.size} such lines)" if bad.size > 1 else ""),
            f"it is {_spelled(truth[bad[0]])}, and the target is not marked as absent in that frame",
            f"correct the line, or write a 1 for the frame in {' or '.join(ABSENT)}",
        )
    return Sequence(name, frames, frames_size(frames, folder), np.where(wrong[:, None], 0.0, truth), ~absent)


def _spelled(box: np.ndarray) -> str:
    return ",".join(f"{value:g}" for value in box)


def _same_length(file: Path, lines: int, frames: list[Path]) -> None:
    if lines == len(frames):
        return
    short = "the truth is too short" if lines < len(frames) else "the video ends early"
    raise DataError(
        f"{file} says {lines} frames, {frames[0].parent} holds {len(frames)}",
        f"one line, or flag, belongs to each frame: {short}",
        "copy the sequence again, or correct the file",
    )


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST:
            raise DataError(f"{file} is too large", f"more than {LARGEST:,} bytes", "check that it is the right file")
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}", str(error), "copy the file again") from None


def _boxes(file: Path) -> np.ndarray:
    """Lines of four numbers between commas, semicolons, tabs or spaces -> (N, 4); empty lines at the end are none."""
    rows = []
    for number, line in enumerate(_text(file).rstrip().splitlines(), 1):
        words = [word for word in re.split(r"[,;\s]+", line.strip()) if word]
        try:
            row = [float(word) for word in words]
        except ValueError:
            row = []
        if len(row) != 4:
            raise DataError(
                f"line {number} of {file} is no box",
                f"{line.strip()[:60]!r} is not four numbers x,y,w,h",
                "write the top left corner, width and height in pixels",
            )
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, 4)


def _flags(file: Path) -> np.ndarray:
    """Zeros and ones between commas, spaces or lines -> bool (N,)."""
    words = [word for word in re.split(r"[,;\s]+", _text(file).strip()) if word]
    if other := next((word for word in words if word not in ("0", "1")), None):
        raise DataError(f"{file} holds {other[:20]!r}", "it must be a 0 or 1 per frame", "copy the file again")
    return np.array([word == "1" for word in words], bool)
