"""From the JPEG to the mask: what a photo costs beside the network, by step, through the code of ``tinymim predict``.

Every photo is read, segmented, and the network alone run after it on an input held ready, so a busy machine slows both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.photo_files import list_photos
from tinymim.errors import ConfigError
from tinymim_export.bench.explain import machine
from tinymim_export.bench.latency import check_time, settings_of
from tinymim_export.bench.results import JsonResult
from tinymim_export.bench.stats import pairwise_ratio
from tinymim_export.bench.timing import MIN_RUNS
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.engines.base import DEFAULT
from tinymim_export.runtime.predictor import Predictor, read_photo
from tinymim_export.tables import markdown_table, text_table

STEPS = ("decode", "resize", "normalise", "network", "mask")
PHOTOS = 64  # of the folder, in turns


@dataclass
class EndToEndRow:
    """One file on one runtime; milliseconds are medians over the photos.

    Attributes:
        ms: Step -> ms. "normalise" is normalisation, layout and padding; "mask" the resize to the photo's size and the
            decision.
        total_ms: All steps together.
        network_ms: The network alone, on an input held ready.
        ratio: Of total and network, photo by photo, with its 95 % interval.
        windows: Runs of the network for a photo.
    """

    file: str
    sha256: str
    engine: str
    threads: int
    runs: int
    windows: float
    ms: dict[str, float]
    total_ms: float
    network_ms: float
    ratio: tuple[float, float, float]


@dataclass
class EndToEndResult(JsonResult):
    """Several rows; prints, writes JSON and Markdown."""

    kind = "tinymim.end_to_end"

    rows: list[EndToEndRow]
    photos: str
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    def table(self) -> list[list[str]]:
        """Heading and one line per row."""
        lines = [["file", "runtime", "photos", *STEPS, "JPEG to mask ms", "network alone ms", "times the network"]]
        for row in self.rows:
            ratio, low, high = row.ratio
            steps = [f"{row.ms[step]:.2f}" for step in STEPS]
            ends = [f"{row.total_ms:.2f}", f"{row.network_ms:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            lines.append([Path(row.file).name, row.engine, str(row.runs), *steps, *ends])
        return lines

    def to_markdown(self) -> str:
        """The table and the machine it holds for."""
        about = self.environment
        return markdown_table(self.table()) + f"\nMeasured on {about['cpu']}, {about['cores']} cores, {self.photos}.\n"

    def print(self) -> None:
        """The table for a terminal."""
        print(text_table(self.table()))


def end_to_end(
    files: Sequence[str | Path],
    photos: str | Path,
    *,
    runtime: str | Sequence[str] = DEFAULT,
    compute_type: str | Sequence[str] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int | None = None,
    seconds: float = 5.0,
    resize_to_file: bool = False,
) -> EndToEndResult:
    """Measure segmentors from photo file to mask.

    Args:
        files: .onnx files of segmentors.
        photos: Folder of photos; :data:`PHOTOS` of them are taken in turns.
        runtime, compute_type, provider, threads: As in :func:`tinymim_export.bench.latency.bench`.
        runs: Photos for each file; None: what ``seconds`` allows, at least 10.
        seconds: Time for each file.
        resize_to_file: Stretch photos to the fixed size of the file.

    Raises:
        ConfigError: no files, options that do not fit, or no segmentor.
        DataError: no photos, or one that cannot be read.
    """
    check_time(runs, seconds)
    if not files:
        raise ConfigError("no files to measure", "the list is empty", "tinymim bench FILE.onnx --end-to-end")
    paths = list_photos(photos, option="--photos")[:PHOTOS]
    predictors = [
        _Timed(
            engine=open_engine(file, runtime=name, provider=provider, compute_type=word, threads=threads),
            resize_to_file=resize_to_file,
        )
        for file in files
        for name, word in settings_of(runtime, compute_type)
    ]
    for predictor in predictors:  # compiled before anything is timed
        for path in paths[:2]:
            predictor.photo(path)
    began, turn = time.monotonic(), 0
    limit = seconds * len(predictors)
    while turn < (runs or MIN_RUNS) or (runs is None and time.monotonic() - began < limit):
        for predictor in predictors:
            predictor.measure(paths[turn % len(paths)])
        turn += 1
    about = f"{len(paths)} photos of {Path(photos).resolve().name}"
    return EndToEndResult([predictor.row() for predictor in predictors], about, machine())


class _Timed(Predictor):
    """The predictor, with a clock around its steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent: dict[str, float] = {}
        self.times: list[dict[str, float]] = []
        self.alone: list[float] = []
        self.runs = 0
        self.once: Callable[[], float] | None = None

    def photo(self, path: Path) -> float:
        """Milliseconds of one photo; those of the steps are in ``spent``."""
        self.spent = dict.fromkeys(STEPS, 0.0)
        began = time.perf_counter()
        pixels = read_photo(path)
        self.spent["decode"] = 1e3 * (time.perf_counter() - began)
        self.mask(pixels)
        total = 1e3 * (time.perf_counter() - began)
        self.spent["mask"] = total - sum(self.spent.values())
        return total

    def measure(self, path: Path) -> None:
        """One photo, then the network alone as often as the photo needed it."""
        before = self.runs
        total = self.photo(path)
        assert self.once is not None
        self.alone.append(sum(self.once() for _ in range(self.runs - before)))
        self.times.append(self.spent | {"total": total, "windows": self.runs - before})

    def row(self) -> EndToEndRow:
        """The figures so far."""
        total = [one["total"] for one in self.times]
        return EndToEndRow(
            file=str(self.engine.path),
            sha256=self.engine.sha256,
            engine=self.engine.label,
            threads=self.engine.threads,
            runs=len(total),
            windows=float(np.mean([one["windows"] for one in self.times])),
            ms={step: float(np.median([one[step] for one in self.times])) for step in STEPS},
            total_ms=float(np.median(total)),
            network_ms=float(np.median(self.alone)),
            ratio=pairwise_ratio(total, self.alone),
        )

    def _resize(self, pixels_HW3: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        resized = super()._resize(pixels_HW3)
        self.spent["resize"] += 1e3 * (time.perf_counter() - began)
        return resized

    def _part(self, resized_hw3: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        began = time.perf_counter()
        part = super()._part(resized_hw3, rows, columns)
        self.spent["normalise"] += 1e3 * (time.perf_counter() - began)
        return part

    def _outputs(self, image_3hw: np.ndarray) -> np.ndarray:
        shape = (1, *image_3hw.shape)
        if self.once is None:
            self.once = self.engine.timer(shape)
        began = time.perf_counter()
        out = super()._outputs(image_3hw)
        self.spent["network"] += 1e3 * (time.perf_counter() - began)
        self.runs += 1
        return out
