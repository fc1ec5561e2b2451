"""Does a file of another precision still give what the FP32 file gives? The rule for every precision is written here.

The FP32 file was compared with PyTorch when it was exported; what is made from it is compared with it: tensors by
cosine, decisions by the share of equal pixels, on real photos where there are some and on noise otherwise. Noise is not
a photo: only the cosine counts there, and static INT8 is not judged by it (its ranges were never measured on noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinymim_export.comparison import ParityResult, Row
from tinymim_export.precision.base import Tolerance, find_precision
from tinymim_export.precision.variants import APPROXIMATE
from tinymim_export.runtime.metadata import first_line, graph_sha256, not_onnx, precision_name, proto_metadata
from tinymim_export.runtime.photos import to_input
from tinymim_export.runtime.sessions import PROVIDERS

EARLY = 0.9  # of the pixels, where the decision comes before the up-sampling: its borders are coarser
NOISE_BATCHES = (1, 3)


def tolerance_of(meta: dict[str, Any]) -> Tolerance:
    """The tolerance for a file, from its metadata."""
    found = find_precision(precision_name(meta)).tolerance
    if any(name in APPROXIMATE for name in meta.get("graph") or []):
        return found._replace(equal_pixels=min(found.equal_pixels, EARLY))
    return found


def compare_files(
    made: Any,
    parent: Any,
    *,
    file: str,
    photos: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> ParityResult:
    """Compare a ModelProto with the FP32 ModelProto it was made from.

    Args:
        made: Its metadata say precision, graph variants and input.
        parent: The FP32 file.
        file: Name for the report.
        photos: Pairs of inputs (1, 3, h, w), for the made file and for its parent.
        size: Height and width of the noise; None takes the parent's.
        seed: Of the noise.
    """
    meta = proto_metadata(made)
    precision, tolerance = find_precision(precision_name(meta)), tolerance_of(meta)
    shared = _shared(made, parent)
    theirs, ours = _session(parent, shared, file), _session(made, shared, file)
    names = list(dict.fromkeys([*(value.name for value in parent.graph.output), *shared]))
    result = ParityResult(file, graph_sha256=graph_sha256(made))
    if photos:
        result.rows += _rows(ours, theirs, names, photos, "photos", tolerance, shared)
    if not (precision.needs_calibration and photos):
        free = isinstance(theirs.get_inputs()[0].shape[0], str) and isinstance(ours.get_inputs()[0].shape[0], str)
        for batch in NOISE_BATCHES if free else NOISE_BATCHES[:1]:
            noise = _noise((batch, *(size or _size(parent)), 3), ours, proto_metadata(parent), seed)
            result.rows += _rows(ours, theirs, names, [noise], "random", tolerance, shared)
    return result


def summary(result: ParityResult, meta: dict[str, Any], parent_sha256: str) -> dict[str, Any]:
    """``parity`` of the metadata: worst figures, thresholds of the precision, and what it was compared with."""
    return (
        result.summary()
        | {
            "test_step": (meta.get("parity") or {}).get("test_step"),  # of the FP32 file
            "thresholds": tolerance_of(meta)._asdict(),
            "precision": precision_name(meta),
            "against": f"the FP32 file {parent_sha256[:12]}",
        }
    )


def _shared(made: Any, parent: Any) -> list[str]:
    """The tensor in front of the decision that both files have, for files that give a mask."""
    if [value.name for value in parent.graph.output] != ["mask"]:
        return []
    have = [{value.name for value in proto.graph.value_info} for proto in (made, parent)]
    return [name for name in ("logits", "scores") if all(name in names for names in have)][:1]


def _session(proto: Any, shown: Sequence[str], file: str) -> Any:
    """A CPU session that also gives the named inner tensors."""
    import onnx

    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in shown)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(copy.SerializeToString(), options, providers=[PROVIDERS["cpu"].title])
    except Exception as error:  # onnxruntime raises several kinds
        raise not_onnx(Path(file), error) from error


def _size(proto: Any) -> tuple[int, int]:
    """Height and width to run at: fixed in the file, or those it was exported at."""
    dims = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]]
    if all(dims):
        return dims[0], dims[1]
    height, width = (proto_metadata(proto).get("cost") or {}).get("size") or (64, 64)
    return int(height), int(width)


def _noise(shape: tuple[int, ...], ours: Any, contract: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of noise (N, H, W, 3) for the made file and for its parent."""
    pixels_NHW3 = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if ours.get_inputs()[0].type == "tensor(uint8)":
        wanted = np.stack([to_input(photo, contract | {"input": None}) for photo in pixels_NHW3])
        return np.ascontiguousarray(pixels_NHW3.transpose(0, 3, 1, 2)), wanted
    both = np.ascontiguousarray((pixels_NHW3.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 73.6)
    return both, both


@dataclass
class _Tally:
    """Sums over the images of one comparison."""

    error: float = 0.0
    largest: float = 0.0
    dot: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    equal: int = 0
    pixels: int = 0

    def add(self, got: np.ndarray, wanted: np.ndarray, decides: bool) -> None:
        """Count one output."""
        if np.issubdtype(wanted.dtype, np.floating):
            a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
            self.error = float(np.maximum(self.error, np.abs(a - b).max()))  # keeps NaN
            self.largest = max(self.largest, float(np.abs(b).max()))
            self.dot, self.ours, self.theirs = (
                self.dot + float(a @ b),
                self.ours + float(a @ a),
                self.theirs + float(b @ b),
            )
            if not decides:
                return
            got, wanted = (x[:, 0] > 0 if x.shape[1] == 1 else x.argmax(axis=1) for x in (got, wanted))
        self.equal += int((got == wanted).sum())
        self.pixels += wanted.size

    def fill(self, row: Row, tolerance: Tolerance) -> None:
        """Write the figures into a row and decide."""
        row.passed = True
        if self.theirs:
            row.max_error, row.relative_error = self.error, self.error / max(self.largest, 1e-12)
            row.cosine = self.dot / max((self.ours * self.theirs) ** 0.5, 1e-30)
            row.passed = bool(row.cosine >= tolerance.cosine)  # False for NaN
        if self.pixels:
            row.equal_pixels = self.equal / self.pixels
            row.passed = row.passed and (row.source != "photos" or row.equal_pixels >= tolerance.equal_pixels)


def _rows(
    ours: Any,
    theirs: Any,
    names: Sequence[str],
    images: Sequence[tuple[np.ndarray, np.ndarray]],
    source: str,
    tolerance: Tolerance,
    inside: Sequence[str],
) -> list[Row]:
    """One row per output over all the images; ``inside`` are inner tensors, not outputs."""
    shape = images[0][1].shape
    shape = (shape[0] * len(images), *shape[1:])
    rows, tallies = [Row(name, shape, source) for name in names], [_Tally() for _ in names]
    for given, wanted in images:
        right = theirs.run(list(names), {theirs.get_inputs()[0].name: wanted})
        try:
            got = ours.run(list(names), {ours.get_inputs()[0].name: given})
        except Exception as error:  # a graph that cannot run
            return [Row(names[0], shape, source, remark=f"onnxruntime failed: {first_line(error)}")]
        for row, tally, a, b in zip(rows, tallies, got, right, strict=True):
            inner = row.name in inside and a.dtype.kind == b.dtype.kind  # float16 there is right
            if a.shape != b.shape or (a.dtype != b.dtype and not inner):
                row.remark = f"gives {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
                return [row]
            tally.add(a, b, row.name in ("logits", "scores"))
    for row, tally in zip(rows, tallies, strict=True):
        tally.fill(row, tolerance)
    return rows
