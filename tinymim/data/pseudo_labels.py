"""``tinymim label``: what a segmentor says of unlabelled photos, as a labelled folder. numpy and Pillow only.

Training a small student on what a large one says of photos without labels is the simplest form of self-training, and
where every pixel's hard label is kept it needs no setting (ST of ST++, Yang et al., CVPR 2022). A threshold leaves out
what the model itself doubts: borders, and rare classes first; what each threshold would keep is told.

The folder appears, by a rename, when all photos are labelled and it has been read back as training reads it. Until then
the work lies in ``.NAME.part`` beside it, where the same command goes on after a kill or Ctrl-C.
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypedDict

import numpy as np

from tinymim.cores import cores
from tinymim.data.dataset_json import read_meaning
from tinymim.data.folders import colours, read_layout
from tinymim.data.label_files import IGNORED, save_mask
from tinymim.data.photo_files import IMAGES, LABELS, list_photos, packed
from tinymim.data.pixels import UnreadablePhoto
from tinymim.data.shards import SUFFIX, base, file_bytes, read_file, split_path
from tinymim.errors import ConfigError, DataError
from tinymim.files import atomic_path, describe_files, environment, file_error, writable, write_json, write_text
from tinymim.folders import hold
from tinymim.progress import Progress, say
from tinymim.schema import Count, check, read_lines

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # probabilities whose shares of the pixels are told
_TRAINING, _LINES = "training", "labels.jsonl"


class Labeller(Protocol):
    """A segmentor that can label photos.

    Attributes:
        file: The model's file.
        sha256: Of the file.
        classes: Names, in the order of its ids.
        palette: A colour for each, or None.
        settings: What else decides the labels.
        at_once: Photos of one call of :meth:`predict`.
    """

    file: Path
    sha256: str
    classes: Sequence[str]
    palette: Sequence[Sequence[int]] | None
    settings: dict[str, Any]
    at_once: int

    def read(self, path: Path) -> Any:
        """A photo, ready for :meth:`predict`; called by threads.

        Raises:
            UnreadablePhoto: it is damaged.
        """

    def predict(self, photos: list[Any]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Of each photo the ids, uint8 (H, W) at its own size, and their probabilities, float32 (H, W), or None."""


class LabelLine(TypedDict):
    """A line of ``labels.jsonl``: a photo that is labelled, and its pixels by id and by threshold."""

    photo: str
    predicted: dict[str, Count]
    kept: dict[str, Count]
    sure: dict[str, Count]


@dataclass
class PseudoLabels:
    """A labelled folder that a segmentor wrote, as noted in its ``labels.json``.

    Attributes:
        out: The folder.
        model: Name and sha256 of the segmentor's file.
        settings: What else decided the labels.
        min_confidence: Pixels below this probability are ignored (255).
        photos: Photos in the folder.
        skipped: Photos that could not be read.
        pixels: Of all labels.
        classes: Name -> ``predicted`` and ``kept``: shares of all pixels, before and after the threshold.
        sure: Threshold -> share of the pixels at least that sure; empty where the file gives masks only.
        photos_per_second: Of this command; None if none was left to label.
        environment: The machine.
    """

    out: Path
    model: dict[str, str]
    settings: dict[str, Any]
    min_confidence: float
    photos: int
    skipped: list[str]
    pixels: int
    classes: dict[str, dict[str, float]]
    sure: dict[str, float]
    photos_per_second: float | None
    environment: dict[str, Any] = field(repr=False)

    @property
    def kept(self) -> float:
        """Share of the pixels that are labelled."""
        return sum(shares["kept"] for shares in self.classes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "tinymim.label"} | vars(self) | {"out": writable(self.out.name), "kept": self.kept}

    def print(self) -> None:
        """Classes, what thresholds would keep, and the summary."""
        width = max(map(len, ["class", *self.classes]))
        print(f"{'class':{width}}  predicted %    kept %")
        for name, shares in self.classes.items():
            print(f"{name:{width}}  {100 * shares['predicted']:11.2f}  {100 * shares['kept']:8.2f}")
        if self.sure:
            shown = ", ".join(f"{100 * share:.1f} % at {least}" for least, share in self.sure.items())
            print(f"sure: {shown} (shares of the pixels that --min-confidence would keep)")
        for path in self.skipped[:5]:
            print(f"warning: left out {path}, which cannot be read")
        if len(self.skipped) > 5:
            print(f"warning: {len(self.skipped) - 5} more left out")
        speed = "" if self.photos_per_second is None else f", {self.photos_per_second:.1f} photos per second"
        print(f"labelled: {self.out}: {self.photos} photos, {100 * self.kept:.1f} % of the pixels kept{speed}")


def write_pseudo_labels(
    labeller: Labeller, photos: str | Path, out: str | Path, *, min_confidence: float = 0.0
) -> PseudoLabels:
    """Label photos and write them, byte for byte, with their labels as ``images/training``, ``annotations/training``.

    Beside them: ``dataset.json`` (the model's classes and colours) and ``labels.json`` (:class:`PseudoLabels`).

    Args:
        labeller: The segmentor.
        photos: A photo, or what :func:`tinymim.data.photo_files.list_photos` takes.
        out: A new folder. Photos keep their paths below ``photos``; of those that would share a label, all keep their
            suffix in the name.
        min_confidence: Pixels whose class has a smaller probability are ignored (255).

    Raises:
        ConfigError: ``out`` is there already or lies in ``photos``, or options that are not possible.
        DataError: no photos, none that can be read, or labels that nothing can be learned from.
        TinyMIMError: the disk is full, or ``out`` cannot be written.
    """
    photos, out = Path(photos), Path(out)
    out = out if out.name else out.absolute()  # "."
    check_request(photos, out, min_confidence)
    found = find_photos(photos)
    settings = {
        "model": {"file": writable(labeller.file.name), "sha256": labeller.sha256},
        "settings": labeller.settings,
        "min_confidence": min_confidence,
        "photos": describe_files(base(photos), found, file_bytes)["list_sha256"],
    }
    settings = json.loads(json.dumps(settings, default=str))  # as they are read back
    names = layout_names(photos, found)
    with _alone(out.with_name(f".{out.name}.part")) as part:
        work = _Work(part, labeller, settings)
        try:
            work.begin()
            skipped, rate = work.label(names, min_confidence)
            result = work.result(out, skipped, rate)
            write_json(work.layout / "labels.json", result.to_dict())
            read_layout(work.layout).need("train")  # as training will
            os.rename(work.layout, out)
        except BaseException as error:
            if work.done and not isinstance(error, DataError):
                say(f"\nnote: {len(work.done)} of {len(names)} photos are labelled; the same command continues")
            else:
                work.remove()
            if isinstance(error, OSError):
                raise file_error(f"cannot use {error.filename or out}", error) from error
            raise
        work.remove()
    return result


def check_request(photos: str | Path, out: str | Path, min_confidence: float) -> None:
    """Refuse options before a model is loaded.

    Raises:
        ConfigError: see :func:`write_pseudo_labels`.
    """
    photos, out = Path(photos), Path(out)
    if not 0 <= min_confidence <= 1:
        raise ConfigError(
            f"--min-confidence {min_confidence}", "it is a probability, 0 to 1", "e.g. --min-confidence 0.9"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        free = next(name for i in range(2, 10_000) if not (name := out.with_name(f"{out.name}-{i}")).exists())
        raise ConfigError(f"{out} is there already", "labels are written to a new folder", f"use --out {free}")
    if photos.is_dir() and packed(photos) is None and out.resolve().is_relative_to(photos.resolve()):
        raise ConfigError(f"{out} is inside {photos}", "it would lie among the photos", "choose a folder next to it")


def find_photos(photos: Path) -> list[Path]:
    """The photos, sorted; a single file is taken as it is.

    Raises:
        DataError: there are none.
    """
    if photos.is_file() and photos.suffix != SUFFIX:
        return [photos]
    return list_photos(photos, option="tinymim label", what="photos to label")


def layout_names(source: Path, photos: Sequence[Path]) -> dict[str, Path]:
    """Path below ``images/training`` -> photo; no two of them would have one label, on no file system."""
    top = base(source)
    top = top.parent if top.is_file() else top
    shards = packed(source) is not None
    names: dict[str, Path] = {}
    paths = [PurePosixPath(_in_shard(p) if shards else p.relative_to(top).as_posix()) for p in photos]
    same = Counter(str(path.with_suffix("")).casefold() for path in paths)
    taken = {key for key, count in same.items() if count == 1}
    for path, photo in zip(paths, photos, strict=True):
        stem = str(path.with_suffix(""))
        if same[stem.casefold()] > 1:
            stem += path.suffix.replace(".", "_")
            while stem.casefold() in taken:
                stem += "_"
            taken.add(stem.casefold())
        names[stem + path.suffix] = photo
    return names


def _in_shard(path: Path) -> str:
    where = split_path(path)
    assert where is not None
    return where[1]


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[Path]:
    """A folder for the block, of this process alone; removed if it is empty then."""
    try:
        with hold(part):
            yield part
    finally:
        with contextlib.suppress(OSError):  # held by another process, or not empty
            part.rmdir()


class _Work:
    """What is labelled so far: ``layout/``, and a line of ``labels.jsonl`` for every photo that is complete there.

    Args:
        part: The folder.
        labeller: The segmentor.
        settings: What decides the labels; what was begun with others is removed.
    """

    def __init__(self, part: Path, labeller: Labeller, settings: dict[str, Any]) -> None:
        self.layout, self.lines, self.labeller, self.settings = part / "layout", part / _LINES, labeller, settings
        self.done: dict[str, LabelLine] = {}

    def begin(self) -> None:
        """Read what was labelled before, and write ``dataset.json``.

        Raises:
            ConfigError: the model's class names cannot be those of a folder.
        """
        if self.lines.is_file():
            first, *rest = list(read_lines(self.lines)) or [{}]
            if first == self.settings:
                lines: list[LabelLine] = [check(line, LabelLine, str(self.lines)) for line in rest]
                self.done = {line["photo"]: line for line in lines}
        if not self.done:
            shutil.rmtree(self.layout, ignore_errors=True)
        whole = [self.settings, *self.done.values()]  # written again, as a kill may have torn the last one
        write_text(self.lines, "".join(json.dumps(line) + "\n" for line in whole))
        classes, file = list(self.labeller.classes), self.layout / "dataset.json"
        palette = [list(colour) for colour in self.labeller.palette or colours(len(classes))]
        write_json(file, {"classes": classes, "palette": palette, "ignore": []})
        try:
            self.palette = read_meaning(file).palette or ()
        except DataError as error:
            raise ConfigError(
                f"{self.labeller.file} cannot label photos", error.why, "train it on a folder that names its classes"
            ) from error

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.layout, ignore_errors=True)
        self.lines.unlink(missing_ok=True)

    def label(self, names: dict[str, Path], least: float) -> tuple[list[str], float | None]:
        """Label what is not done yet; the photos that cannot be read, and photos per second.

        Raises:
            DataError: none can be read.
        """
        todo = [(name, path) for name, path in names.items() if name not in self.done]
        if self.done:
            say(f"note: {len(self.done)} of {len(names)} photos were labelled before")
        skipped: list[str] = []
        progress, began = Progress("label", len(names), start=len(self.done)), time.monotonic()
        groups = [todo[at : at + self.labeller.at_once] for at in range(0, len(todo), self.labeller.at_once)]
        with ThreadPoolExecutor(cores()) as threads, open(self.lines, "a", encoding="utf-8") as lines:

            def read(group: list[tuple[str, Path]]) -> list[Future[Any]]:
                return [threads.submit(self.labeller.read, path) for _, path in group]

            def note(written: list[Future[LabelLine]]) -> None:
                for line in written:
                    self.done[line.result()["photo"]] = line.result()
                    lines.write(json.dumps(line.result()) + "\n")
                lines.flush()
                progress.update(len(self.done) + len(skipped), images=len(written))

            coming, writing = read(groups[0]) if groups else [], list[Future[LabelLine]]()
            for number, group in enumerate(groups):  # the next are read, and the last written, meanwhile
                here, coming = coming, read(groups[number + 1]) if number + 1 < len(groups) else []
                ready = []
                for (name, path), photo in zip(group, here, strict=True):
                    try:
                        ready.append((name, path, photo.result()))
                    except UnreadablePhoto:
                        skipped.append(str(path))
                masks = self.labeller.predict([photo for _, _, photo in ready]) if ready else []
                note(writing)
                writing = [
                    threads.submit(self._write, name, path, *mask, least)
                    for (name, path, _), mask in zip(ready, masks, strict=True)
                ]
            note(writing)
        progress.close()
        if not self.done:
            raise DataError(
                "no photo can be read", f"all {len(skipped)} are damaged, the first is {skipped[0]}", "copy them again"
            )
        spent = time.monotonic() - began
        return skipped, (len(todo) - len(skipped)) / spent if todo else None

    def _write(self, name: str, path: Path, ids_HW: np.ndarray, sure_HW: np.ndarray | None, least: float) -> LabelLine:
        """Write a photo and its label.

        Raises:
            DataError: an id without a class.
        """
        if (largest := int(ids_HW.max())) >= len(self.labeller.classes):
            raise DataError(
                f"{self.labeller.file} gives the id {largest}",
                f"it names {len(self.labeller.classes)} classes",
                "use a segmentor that names a class for every id",
            )
        content = read_file(path)
        kept_HW = ids_HW if sure_HW is None else np.where(sure_HW < np.float32(least), np.uint8(IGNORED), ids_HW)
        with atomic_path(self.layout / IMAGES / _TRAINING / name) as part:
            part.write_bytes(content)
        save_mask(kept_HW, (self.layout / LABELS / _TRAINING / name).with_suffix(".png"), self.palette)
        sure = {} if sure_HW is None else {str(t): int((sure_HW >= np.float32(t)).sum()) for t in THRESHOLDS}
        return {"photo": name, "predicted": _counts(ids_HW), "kept": _counts(kept_HW), "sure": sure}

    def result(self, out: Path, skipped: list[str], rate: float | None) -> PseudoLabels:
        """All of it in numbers.

        Raises:
            DataError: fewer than two classes are kept.
        """
        predicted, kept, sure = Counter[str](), Counter[str](), Counter[str]()
        for line in self.done.values():
            predicted.update(line["predicted"])
            kept.update(line["kept"])
            sure.update(line["sure"])
        pixels, least, photos = predicted.total(), self.settings["min_confidence"], len(self.done)
        classes = {
            name: {"predicted": predicted[str(i)] / pixels, "kept": kept[str(i)] / pixels}
            for i, name in enumerate(self.labeller.classes)
        }
        there = [name for name, shares in classes.items() if shares["kept"]]
        if len(there) < 2:
            raise DataError(
                f"the labels hold {f'one class only, {there[0]!r}' if there else 'no class'}: nothing can be learned",
                f"of {photos} photos no other pixel reaches --min-confidence {least}"
                if least
                else f"the segmentor sees nothing else in {photos} photos",
                "lower --min-confidence" if least else "label with a better segmentor, or other photos",
            )
        return PseudoLabels(
            out=out,
            model=self.settings["model"],
            settings=self.settings["settings"],
            min_confidence=least,
            photos=photos,
            skipped=[writable(path) for path in skipped],
            pixels=pixels,
            classes=classes,
            sure={threshold: count / pixels for threshold, count in sure.items()},
            photos_per_second=rate,
            environment=environment(),
        )


def _counts(ids_HW: np.ndarray) -> dict[str, int]:
    """Id -> pixels, of those that occur; ignored ones are not counted."""
    counts = np.bincount(ids_HW.ravel(), minlength=256)
    return {str(i): int(count) for i, count in enumerate(counts) if count and i != IGNORED}
