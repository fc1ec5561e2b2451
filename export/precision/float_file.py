"""An FP32 file, read once, and what can be made of it: graph variants applied, blocks known, ranges measured once."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim.files import sha256_file
from tinymim_export.precision.base import PRECISIONS, find_precision
from tinymim_export.precision.blocks import blocks_of
from tinymim_export.precision.calibrate import Histogram, NetworkInputs, PhotoSet, choose_photos, measure
from tinymim_export.precision.qdq import check_opset, prepare
from tinymim_export.precision.variants import apply_variants
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.metadata import check_verified, load_proto, precision_name, proto_metadata
from tinymim_export.runtime.photos import load_photos
from tinymim_export.runtime.predictor import read_photo

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
        name = precision_name(meta)
        if name != "fp32":
            raise ConfigError(
                f"{path} is {name} already",
                "every precision is made from the FP32 file",
                "give the FP32 file it came from",
            )
        if meta.get("part") == "tracker":
            raise ConfigError(
                f"{path} is a tracker",
                "other precisions and graphs are made of files that take one image",
                "use the FP32 file: tinymim-export --onnx OUT --checkpoint tracker.pth",
            )
        self.sha256 = sha256_file(path)
        self.verified = check_verified(path, meta) is True
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
        calibrated = [precision for precision in PRECISIONS.values() if precision.needs_calibration]
        tensors = list(dict.fromkeys(name for precision in calibrated for name in precision.activations(graph)))
        images = (inputs(path, seed + i) for i, path in enumerate(self.photos.photos))
        self.ranges = measure(graph.proto, tensors, images, count)
        self.notes += inputs.notes

    def build(
        self, precision: str, excluded: Sequence[str] = (), method: str = "percentile"
    ) -> tuple[Any, dict[str, int], dict[str, int]]:
        """A new ModelProto in a precision, its layers by operator, and why others stayed in float."""
        made = _copy(self.proto)
        built = find_precision(precision).build(self, made, excluded, method)
        self.notes += built.notes
        return made, built.layers, built.left

    def about(self, precision: str, excluded: Sequence[str], method: str) -> dict[str, Any]:
        """``precision`` of the metadata."""
        calibration = self.photos.about(method) if self.photos and find_precision(precision).needs_calibration else None
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


def _copy(proto: Any) -> Any:
    made = type(proto)()
    made.CopyFrom(proto)
    return made
