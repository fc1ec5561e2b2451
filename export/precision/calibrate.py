"""Calibration: which photos, what the network sees of them, and how far each activation reaches.

A seeded choice of photos goes through the same code that runs at inference (:class:`Predictor`: OpenCV's resize, the
file's own normalisation, its windows), then through the float file once; histograms of every tensor are kept, so a
range can be read off by any method without another pass.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.photo_files import IMAGES, LABELS, list_photos
from tinymim.data.shards import base, read_file
from tinymim.errors import ConfigError, DataError
from tinymim.progress import Progress, say
from tinymim_export.runtime.engines import Engine
from tinymim_export.runtime.photos import to_input
from tinymim_export.runtime.predictor import Predictor, read_photo
from tinymim_export.runtime.resize import resize_bilinear
from tinymim_export.runtime.sessions import PROVIDERS

METHODS = ("percentile", "entropy", "minmax")
PERCENTILE = 99.99  # percent of a tensor's values inside the range; half of the rest beyond either end
FEW_COLOURS = 32  # a photo of 64 x 64 samples has hundreds; masks and drawings have fewer
BINS, SAMPLES = 4096, 100_000  # of a histogram; values counted of one tensor and photo (the extremes see all)


@dataclass
class PhotoSet:
    """The photos of one calibration, and what the file's metadata keep of them."""

    folder: Path
    photos: list[Path]
    spare: list[Path]  # photos of the folder that were not chosen
    seed: int
    files: list[list[str]] = field(default_factory=list)  # relative name, first 16 hex digits of the sha256

    def about(self, method: str) -> dict[str, Any]:
        """``precision.calibration`` of the metadata."""
        return {
            "folder": self.folder.resolve().name,
            "count": len(self.photos),
            "seed": self.seed,
            "method": method,
            "files": self.files,
            "list_sha256": hashlib.sha256(json.dumps(self.files).encode()).hexdigest(),
        }


def choose_photos(folder: str | Path, count: int = 64, seed: int = 0) -> PhotoSet:
    """A seeded choice of photos below a folder; of a labelled folder (ADE20K layout) its training photos.

    Raises:
        ConfigError: a count that is not possible.
        DataError: no folder, no or too few readable photos, or pictures no range can be measured on: masks, one grey
            image, copies of one photo.
    """
    folder = Path(folder)
    if count < 1:
        raise ConfigError(f"--calibration-count {count} is not possible", "it counts photos", "e.g. 64")
    root = folder
    if (folder / IMAGES).is_dir() and (folder / LABELS).is_dir():
        root = next(p for p in (folder / IMAGES / "training", folder / IMAGES) if p.is_dir())
    found = list_photos(root, option="--calibration", what="calibration photos")
    order = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    chosen: list[Path] = []
    colours, seen, bad = [], set(), []
    while order and len(chosen) < count:
        path = order.pop(0)
        try:
            pixels = read_photo(path)
        except DataError as error:
            bad.append(f"{path.name} ({error.why})")
            continue
        chosen.append(path)
        colours.append(_colours(pixels))
        seen.add(hashlib.sha256(pixels).digest())
    for name in bad:
        say(f"warning: skipped {name}")
    if len(chosen) < count:
        why = f"{len(chosen)} of its {len(found)} pictures can be read" if bad else f"it holds {len(found)}"
        raise DataError(
            f"{count} calibration photos were asked for, {root} has fewer",
            why,
            f"add photos, or accept rougher ranges with --calibration-count {len(chosen)}" if chosen else "add photos",
        )
    _refuse_useless(root, colours, len(seen))
    top = base(folder)
    files = [[path.relative_to(top).as_posix(), hashlib.sha256(read_file(path)).hexdigest()[:16]] for path in chosen]
    return PhotoSet(folder, chosen, order, seed, files)


def _colours(pixels_HW3: np.ndarray) -> int:
    """Distinct colours among 64 x 64 evenly spread pixels."""
    rows, columns = (np.linspace(0, side - 1, 64).astype(int) for side in pixels_HW3.shape[:2])
    return len(np.unique(pixels_HW3[rows][:, columns].reshape(-1, 3), axis=0))


def _refuse_useless(folder: Path, colours: Sequence[int], distinct: int) -> None:
    """Refuse a set no honest range can be measured on."""
    fix = "give photos like those the file will see: 50 or more, of different scenes"
    what = f"the photos in {folder} cannot calibrate"
    if max(colours) == 1:
        shown = "its only picture is" if len(colours) == 1 else f"its {len(colours)} pictures are"
        raise DataError(what, f"{shown} of one colour each, without any variation: every range would be wrong", fix)
    if sum(1 < n <= FEW_COLOURS for n in colours) * 2 > len(colours):
        raise DataError(
            what,
            f"most of them have {FEW_COLOURS} colours or fewer, as masks, labels and drawings have",
            "give the folder of the photos, not that of the masks",
        )
    if distinct == 1 and len(colours) > 1:
        raise DataError(what, f"all {len(colours)} chosen are the same picture", fix)


class NetworkInputs:
    """What a file's graph is given for a photo at inference, as (1, 3, h, w) arrays.

    Args:
        engine: The opened float file.

    Attributes:
        notes: What differs from the file's contract.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.notes: list[str] = []
        self.recorder: _Recorder | None = None
        if not engine.meta.get("mean") or not engine.meta.get("std"):
            raise ConfigError(
                f"{engine.path.name} does not say how photos are normalised",
                "it has no tinymim.mean and tinymim.std, so nothing can be measured or compared on photos",
                "export it with tinymim-export, or use --precision int8-dynamic without photos",
            )
        if engine.meta.get("part", "segmentor") == "segmentor":
            mask = engine.output == "mask"  # masks cannot be averaged over windows
            self.recorder = _Recorder(engine=engine, mode="whole" if mask else None)

    def __call__(self, photo: Path | np.ndarray, seed: int = 0) -> np.ndarray:
        """One input made of a photo (a file, or uint8 RGB pixels); of several windows a seeded one."""
        pixels = photo if isinstance(photo, np.ndarray) else read_photo(photo)
        if self.recorder is None:
            height, width = self.engine.size
            size = (height or pixels.shape[0], width or pixels.shape[1])
            return to_input(resize_bilinear(pixels, size), self.engine.meta)[None]
        try:
            seen = self.recorder.record(pixels)
        except ConfigError:
            if self.recorder.stretch or None in self.engine.size:
                raise
            height, width = self.engine.size
            self.notes.append(f"calibration photos are stretched to {height}x{width}, the size fixed in the file")
            self.recorder = _Recorder(engine=self.engine, resize_to_file=True)
            seen = self.recorder.record(pixels)
        return seen[int(np.random.default_rng(seed).integers(len(seen)))][None]


class _Recorder(Predictor):
    """A Predictor that keeps what it would run."""

    def record(self, pixels_HW3: np.ndarray) -> list[np.ndarray]:
        """Inputs (3, h, w) of one photo."""
        self.seen: list[np.ndarray] = []
        self._network(pixels_HW3)
        return self.seen

    def _run(self, image_3hw: np.ndarray) -> np.ndarray:
        self.seen.append(image_3hw)
        return np.zeros((1, *image_3hw.shape[1:]), np.float32)


class Histogram:
    """Counts of a tensor's values over a range that doubles when a larger value comes; exact smallest and largest.

    Attributes:
        channels: Smallest and largest value of every channel (2, channels), the last axis; None where not wanted.
    """

    def __init__(self, *, by_channel: bool = False) -> None:
        self.by_channel = by_channel
        self.channels: np.ndarray | None = None
        self.low, self.high = np.inf, -np.inf
        self.reach = 2.0**-20  # counts cover -reach .. reach
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count one tensor.

        Raises:
            DataError: it holds values that are not numbers.
        """
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                "the float file gives infinite or NaN values on a calibration photo",
                "its weights are damaged, or the photo is far from what it was trained on",
                "run tinymim eval on the FP32 file first",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.by_channel:
            rows = values.reshape(-1, values.shape[-1])
            ends = np.stack([rows.min(0), rows.max(0)])
            seen = ends if self.channels is None else self.channels
            self.channels = np.stack([np.minimum(seen[0], ends[0]), np.maximum(seen[1], ends[1])])
        while self.reach < max(-low, high):
            paired = self.counts.reshape(-1, 2).sum(1)
            self.counts[:] = 0
            self.counts[BINS // 4 : -BINS // 4] = paired
            self.reach *= 2
        flat = values.reshape(-1)
        if flat.size > SAMPLES:  # at random places: a stride would see some channels only
            flat = flat[np.random.default_rng(0).integers(0, flat.size, SAMPLES)]
        at = ((flat + np.float32(self.reach)) * np.float32(BINS / 2 / self.reach)).astype(np.int32)
        self.counts += np.bincount(np.clip(at, 0, BINS - 1), minlength=BINS)

    def range(self, method: str) -> tuple[float, float]:
        """Smallest and largest value that the 256 levels should reach."""
        if method == "minmax":
            return self.low, self.high
        if method == "entropy":
            return self._least_divergence()
        edges = np.linspace(-self.reach, self.reach, BINS + 1)
        share = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        tail = (1 - PERCENTILE / 100) / 2
        low = edges[np.searchsorted(share, tail, "right") - 1]
        high = edges[np.searchsorted(share, 1 - tail, "left")]
        low, high = np.clip([low, high], self.low, self.high)  # a value next to an edge is counted on either side
        return float(low), float(high)

    def _least_divergence(self) -> tuple[float, float]:
        """The clipped range whose 256 levels lose the least information (Kullback-Leibler, as TensorRT calibrates)."""
        edges = np.linspace(-self.reach, self.reach, BINS + 1)
        best = (np.inf, (self.low, self.high))
        for keep in np.linspace(0.2, 1.0, 81):
            low = self.low * keep if self.low < 0 else self.low  # towards zero, and never out of what was seen
            high = self.high * keep if self.high > 0 else self.high
            first, last = np.searchsorted(edges, low, "right") - 1, np.searchsorted(edges, high, "left")
            inside = self.counts[first:last].astype(np.float64)
            if len(inside) < 2 or inside.sum() == 0:  # one bin loses nothing, whatever is left out
                continue
            wanted = inside.copy()
            wanted[0] += self.counts[:first].sum()
            wanted[-1] += self.counts[last:].sum()
            level = np.arange(len(inside)) * 256 // max(len(inside), 256)
            used = np.bincount(level, inside > 0)
            spread = np.divide(np.bincount(level, inside), used, out=np.zeros(len(used)), where=used > 0)
            given = np.where(inside > 0, spread[level], 0)
            p, q = wanted / wanted.sum(), np.maximum(given / given.sum(), 1e-12)
            loss = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
            best = min(best, (loss, (low, high)))
        return best[1]


def measure(
    proto: Any, tensors: Sequence[str], inputs: Iterator[np.ndarray], count: int, quiet: bool = False
) -> dict[str, Histogram]:
    """Histograms of tensors of a float graph over some inputs; one photo in memory at a time.

    What a LayerNormalization gives is also measured by channel.
    """
    import onnx
    import onnxruntime as ort

    shown = type(proto)()
    shown.CopyFrom(proto)
    given = shown.graph.input[0].name
    have = {value.name for value in shown.graph.output}
    inner = [name for name in tensors if name != given]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner if name not in have)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(shown.SerializeToString(), options, providers=[PROVIDERS["cpu"].title])
    norms = {node.output[0] for node in proto.graph.node if node.op_type == "LayerNormalization"}
    found = {name: Histogram(by_channel=name in norms) for name in tensors}
    progress = None if quiet else Progress("calibration", count)
    for i, image in enumerate(inputs):
        for name, value in zip(inner, session.run(inner, {given: image}), strict=True):
            found[name].add(value)
        if given in found:
            found[given].add(image)
        if progress is not None:
            progress.update(i + 1, images=1)
    if progress is not None:
        progress.close()
    return found
