"""An FP32 file, read once, and what can be made of it: graph variants applied, blocks known, ranges measured once."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim.files import sha256_file
from tinymim_export.precision.blocks import blocks_of
from tinymim_export.precision.calibrate import Histogram, NetworkInputs, PhotoSet, choose_photos, measure
from tinymim_export.precision.fp16 import to_half
from tinymim_export.precision.qdq import (
    check_opset,
    find_targets,
    insert_dynamic,
    insert_static,
    insert_weights,
    observed,
    prepare,
)
from tinymim_export.precision.variants import Graph, apply_variants
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.metadata import is_verified, load_proto, proto_metadata
from tinymim_export.runtime.photos import load_photos
from tinymim_export.runtime.predictor import read_photo

KINDS = {  # operators whose weights a precision turns into int8
    "int8": ("Conv", "MatMul"),
    "int8-dynamic": ("MatMul",),
    "int8-weights": ("Conv", "ConvTranspose", "MatMul"),
}
CHECKED_PHOTOS = 8  # compared with the FP32 file


class FloatFile:
    """An FP32 file, read once: graph variants applied, blocks known, ranges measured at most once.

    Args:
        path: The .onnx file.
        graph: Graph variants to apply.

    Raises:
        ConfigError: not FP32, or a variant that does not fit.
        DataError: missing or damaged.
    """

    def __init__(self, path: str | Path, graph: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.original = load_proto(path)
        meta = proto_metadata(self.original)
        name = (meta.get("precision") or {}).get("name", "fp32")
        if name != "fp32":
            raise ConfigError(
                f"{path} is {name} already",
                "every precision is made from the FP32 file",
                "give the FP32 file it came from",
            )
        self.sha256 = sha256_file(path)
        self.verified = is_verified(self.original)
        self.proto = apply_variants(self.original, graph)
        prepare(self.proto)
        self.meta = proto_metadata(self.proto)
        self.blocks = blocks_of(self.proto)
        self.photos: PhotoSet | None = None
        self.ranges: Mapping[str, Histogram] = {}
        self.inputs: NetworkInputs | None = None  # photo -> input, opened when first needed
        self.notes: list[str] = []

    def calibrate(self, folder: str | Path, count: int, seed: int) -> None:
        """Measure the range of every activation that may be quantised, once.

        Raises:
            ConfigError, DataError: an operator set, file or photos that do not allow it.
        """
        check_opset(self.proto)
        self.photos = choose_photos(folder, count, seed)
        inputs = self.inputs = self.inputs or NetworkInputs(engine_of(self.proto, self.path.name))
        graph = prepare(_copy(self.proto))
        tensors = observed(find_targets(graph, kinds=KINDS["int8"]))
        images = (inputs(path, seed + i) for i, path in enumerate(self.photos.photos))
        self.ranges = measure(graph.proto, tensors, images, count)
        self.notes += inputs.notes

    def build(
        self, precision: str, excluded: Sequence[str] = (), method: str = "percentile"
    ) -> tuple[Any, dict[str, int], dict[str, int]]:
        """A new ModelProto in a precision, its layers by operator, and why others stayed in float."""
        made = _copy(self.proto)
        layers: dict[str, int] = {}
        left: dict[str, int] = {}
        if precision == "fp16":
            if clipped := to_half(made):
                self.notes.append(f"{clipped} weights were too large for float16 and were clipped")
        elif precision != "fp32":
            graph = prepare(made)
            outside = {node for block in excluded for node in self.blocks[block]}
            possible = find_targets(graph, kinds=KINDS[precision])
            targets = [target for target in possible if target.node.name not in outside]
            layers = dict(Counter(target.node.op_type for target in targets))
            left = _left(graph, precision, {t.node.name for t in targets}, {t.node.name for t in possible})
            if precision == "int8":
                insert_static(graph, targets, {name: h.range(method) for name, h in self.ranges.items()})
            elif precision == "int8-dynamic":
                insert_dynamic(graph, targets)
            else:
                insert_weights(graph, targets)
        return made, layers, left

    def about(self, precision: str, excluded: Sequence[str], method: str) -> dict[str, Any]:
        """``precision`` of the metadata."""
        calibration = self.photos.about(method) if self.photos and precision == "int8" else None
        return {
            "name": precision,
            "parent_sha256": self.sha256,
            "calibration": calibration,
            "excluded": list(excluded),
        }

    def photo_pairs(self, made: Any, photos: str | Path | None) -> list[Any]:
        """Inputs of real photos for (the made file, the FP32 file): given ones, else calibration photos not used."""
        if photos is not None:
            found = [np.asarray(photo) for photo in load_photos(photos, limit=CHECKED_PHOTOS)]
        elif self.photos is not None:
            paths = self.photos.spare[:CHECKED_PHOTOS] or self.photos.photos[:CHECKED_PHOTOS]
            found = [read_photo(path) for path in paths]
        else:
            return []
        here = NetworkInputs(engine_of(made, self.path.name))
        there = NetworkInputs(engine_of(self.original, self.path.name))
        return [(here(photo, i), there(photo, i)) for i, photo in enumerate(found)]


def engine_of(proto: Any, name: str) -> Engine:
    """A ModelProto opened on ONNX Runtime's CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(proto.SerializeToString())
        return open_engine(path)


def _left(graph: Graph, precision: str, done: set[str], possible: set[str]) -> dict[str, int]:
    """Why layers stay in float -> how many."""
    why: Counter[str] = Counter()
    for node in graph.graph.node:
        if node.name in done or node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm", "MultiHeadAttention"):
            continue
        if node.name in possible:
            why["in excluded blocks"] += 1
        elif node.op_type == "MultiHeadAttention" or not any(graph.constant(name) is not None for name in node.input):
            why["products of activations (attention)"] += 1
        elif node.op_type == "MatMul":
            why["small or pooling products"] += 1
        elif precision == "int8-dynamic":
            why[f"{node.op_type} (not done dynamically)"] += 1
        else:
            why["first and last Conv" if node.op_type == "Conv" else f"{node.op_type} (no INT8 kernel)"] += 1
    return dict(why)


def _copy(proto: Any) -> Any:
    made = type(proto)()
    made.CopyFrom(proto)
    return made
