"""ONNX Runtime: runs a file as it is, on the CPU, by CUDA or by TensorRT."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tinymim_export.runtime.engines.base import Engine, Port, cannot_run, random_input, register_runtime
from tinymim_export.runtime.metadata import read_metadata
from tinymim_export.runtime.sessions import (
    PROVIDERS,
    nodes_per_provider,
    open_session,
    profile,
    refuse_fallback,
    require_provider,
    runner,
)

if TYPE_CHECKING:
    import numpy as np


@register_runtime
class OnnxRuntimeEngine(Engine):
    """A file in an ONNX Runtime session on exactly one provider.

    Attributes:
        session: The ``onnxruntime.InferenceSession``.
    """

    runtime, title = "onnxruntime", "ONNX Runtime"
    providers = tuple(PROVIDERS.values())
    packages = ("onnxruntime", "onnxruntime-gpu")

    def __init__(self, path: Path, provider: str, compute_type: str | None, threads: int) -> None:
        super().__init__(path, provider, compute_type, threads)
        self.session = open_session(path, provider, threads)
        inputs, outputs = (
            [Port(item.name, _dtype(item.type), tuple(item.shape)) for item in items]
            for items in (self.session.get_inputs(), self.session.get_outputs())
        )
        self.describe(inputs, outputs, read_metadata(self.session, path.name))

    @classmethod
    def require(cls, provider: str, compute_type: str | None) -> None:
        """Raise :class:`ConfigError` where the installed onnxruntime lacks the provider."""
        require_provider(provider)

    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        return self.session.run([self.output], {self.input: images_N3HW})[0]

    def timer(self, shape: tuple[int, ...], seed: int = 0) -> Callable[[], float]:
        once = runner(self.session, {self.input: random_input(shape, self.dtype, seed)}, self.provider)
        try:
            once()
        except Exception as error:  # onnxruntime raises several kinds
            raise cannot_run(self.path, shape, self.size, error) from error
        return once

    def placement(self) -> dict[str, Counter[str]]:
        """See :func:`tinymim_export.runtime.sessions.nodes_per_provider`."""
        placed = nodes_per_provider(self.session, self.path, self.provider, self.threads, self.some_shape())
        refuse_fallback(self.path, self.provider, placed)
        return placed

    def operator_times(self, shape: tuple[int, ...], runs: int) -> Counter[str]:
        ms: Counter[str] = Counter()
        for about, took in profile(self.path, self.provider, self.threads, shape, runs):
            ms[about["op_name"]] += took / runs
        return ms

    def unfused_pairs(self) -> int | None:
        """QuantizeLinear nodes whose result goes straight into a DequantizeLinear; needs onnx. TensorRT writes no
        graph to count in: None."""
        if self.provider == "tensorrt":
            return None
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            open_session(self.path, self.provider, 1, optimised=optimised)
            graph = onnx.load(str(optimised)).graph
        dequantised = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        return sum(node.op_type == "QuantizeLinear" and node.output[0] in dequantised for node in graph.node)


def _dtype(kind: str) -> str:
    """ONNX Runtime's word for a tensor type as numpy's: "tensor(float)" -> "float32"."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)
