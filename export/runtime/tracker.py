"""A tracker's .onnx file, run by ONNX Runtime: crops in, box out. numpy and onnxruntime only."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from tinymim.cores import cores
from tinymim.errors import ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.records import Pixels
from tinymim.schema import Above0, check
from tinymim_export.runtime.metadata import check_verified, read_metadata
from tinymim_export.runtime.sessions import open_session


class Crops(TypedDict):
    """What a file says under ``tinymim.tracker`` of the crops it takes."""

    template_size: Pixels
    search_size: Pixels
    template_factor: Above0
    search_factor: Above0


class OnnxNetwork:
    """A verified file of ``tinymim-export``, for :class:`tinymim.track.following.OneStream`.

    Args:
        path: The .onnx file.
        provider: "cpu", or "cuda" where this onnxruntime has it.
        threads: CPU threads; None: every core this process may use.

    Attributes:
        name: File and runtime.
        sizes: Sides of template and search crop, pixels.
        factors: Of their squares.
        sha256: Of the file.
        verified: Whether its claim to be verified holds; None: it makes none.

    Raises:
        DataError: no such file, damaged, or no tracker.
    """

    def __init__(self, path: str | Path, *, provider: str = "cpu", threads: int | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no file at {path}", "it does not exist", "check the path")
        self.session = open_session(path, provider, threads or cores())
        meta: dict[str, Any] = read_metadata(self.session, path.name)
        config, inputs = meta.get("tracker"), [item.name for item in self.session.get_inputs()]
        if config is None or meta.get("mean") is None or meta.get("std") is None or inputs != ["template", "search"]:
            raise ConfigError(
                f"{path} is no tracker",
                f"its inputs are {', '.join(inputs)}; a tracker takes template and search, and says how to cut them",
                f"export one: tinymim-export --onnx {path.with_name('tracker.onnx')} --checkpoint tracker.pth",
            )
        check(config, Crops, f"tinymim.tracker of {path}", fix="export it again with tinymim-export")
        self.name, self.sha256, self.verified = path.name, sha256_file(path), check_verified(path, meta)
        self.sizes = (int(config["template_size"]), int(config["search_size"]))
        self.factors = (float(config["template_factor"]), float(config["search_factor"]))
        self.mean, self.std = (np.array(meta[key], np.float32) for key in ("mean", "std"))

    def locate(self, template: np.ndarray, search: np.ndarray) -> tuple[np.ndarray, float]:
        """Crops uint8 (Z, Z, 3) and (S, S, 3) -> centre x, y, width, height as fractions (4,), and confidence."""
        views = {
            name: np.ascontiguousarray(((crop - self.mean) / self.std).transpose(2, 0, 1)[None], np.float32)
            for name, crop in (("template", template), ("search", search))
        }
        box, confidence = self.session.run(["box", "confidence"], views)
        return box[0].astype(np.float64), float(confidence[0])
