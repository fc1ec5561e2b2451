"""OpenVINO on the CPU. It can run an FP32 file in bfloat16 where the processor has it: a setting, not another file."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim.errors import ConfigError
from tinymim_export.runtime.engines.base import Engine, Port, random_input, register_runtime
from tinymim_export.runtime.metadata import decode, first_line, not_onnx
from tinymim_export.runtime.providers import Provider

if TYPE_CHECKING:
    import numpy as np


@register_runtime
class OpenVINOEngine(Engine):
    """A file under OpenVINO, compiled for every input shape it meets."""

    runtime, title = "openvino", "OpenVINO"
    providers = (Provider("cpu", "OpenVINO CPU", target="openvino"),)
    compute_types = ("f32", "bf16")
    packages = ("openvino",)

    def __init__(self, path: Path, provider: str, compute_type: str | None, threads: int) -> None:
        super().__init__(path, provider, compute_type, threads)
        self.core = _the_core()
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.requests: dict[tuple[int, ...], Any] = {}
        try:
            if path.suffix == ".xml":  # its own format, of tinymim-export --format openvino
                model = self.core.read_model(str(path))
            else:
                model = _front_end().convert_partially(_front_end().load(str(path)))  # what it lacks is named later
        except Exception as error:  # OpenVINO raises several kinds
            raise not_onnx(path, error) from error
        properties = dict(model.get_rt_info()).get("framework", {})  # metadata_props of the file
        meta = decode({key: getattr(value, "value", value) for key, value in properties.items()}, path.name)
        if path.suffix == ".xml":  # verified is what it was made of; it was compared with that when it was written
            meta = {key: value for key, value in meta.items() if key not in ("verified", "parity")}
        self.describe(_ports(model.inputs), _ports(model.outputs), meta)

    @classmethod
    def require(cls, provider: str, compute_type: str | None) -> None:
        """Raise :class:`ConfigError` where OpenVINO is not installed or this processor has no such arithmetic."""
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "OpenVINO is not installed", "--runtime openvino needs it", 'pip install "tinymim[openvino]"'
            ) from error
        able = _the_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if compute_type == "bf16" and "BF16" not in able:
            raise ConfigError(
                "this processor has no bfloat16 arithmetic",
                f"OpenVINO offers {', '.join(able)} here; a bf16 figure would be an emulation's",
                "leave --precision out, or measure on a processor with AMX or AVX512-BF16",
            )

    def compile(self, shape: tuple[int, ...], **more: Any) -> Any:
        """The compiled model for one input shape; models with more than the usual settings are not kept.

        Raises:
            ConfigError: OpenVINO has no such operator, or the graph does not take this shape.
        """
        if shape in self.compiled and not more:
            return self.compiled[shape]
        try:
            model = self.core.read_model(str(self.path))
            model.reshape({self.input: list(shape)})
            compiled = self.core.compile_model(model, "CPU", self.settings() | more)
        except RuntimeError as error:  # the file could be read: it is not damaged
            lines = [line for line in str(error).splitlines() if "No conversion rule" in line or "heck" in line]
            raise ConfigError(
                f"OpenVINO cannot run {self.path.name} at {'x'.join(map(str, shape))}",
                first_line(lines[-1] if lines else error),
                "use --runtime onnxruntime, or pip install -U openvino",
            ) from error
        if not more:
            self.compiled[shape] = compiled
        return compiled

    def settings(self) -> dict[str, Any]:
        """Properties given to OpenVINO."""
        return {
            "INFERENCE_PRECISION_HINT": self.compute_type,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }

    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        import numpy as np

        shape = images_N3HW.shape
        if shape not in self.requests:
            self.requests[shape] = self.compile(shape).create_infer_request()
        return np.array(self.requests[shape].infer({0: images_N3HW}, share_inputs=True)[0])

    def timer(self, shape: tuple[int, ...], seed: int = 0) -> Callable[[], float]:
        import openvino

        request = self.compile(tuple(shape)).create_infer_request()
        image = random_input(shape, self.dtype, seed)
        request.set_input_tensor(openvino.Tensor(image, shared_memory=True))

        def once() -> float:
            began = time.perf_counter_ns()
            request.infer()
            return (time.perf_counter_ns() - began) / 1e6

        once.held = image  # type: ignore[attr-defined]  # the shared input must outlive the request
        return once

    def placement(self) -> dict[str, Counter[str]]:
        shape = next(iter(self.compiled), self.some_shape())
        nodes = self.compile(shape).get_runtime_model().get_ops()
        ops = Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)
        for no_work in ("Const", "Input", "Output"):
            del ops[no_work]
        return {self.place.title: ops}

    def operator_times(self, shape: tuple[int, ...], runs: int) -> Counter[str]:
        request = self.compile(tuple(shape), PERF_COUNT=True).create_infer_request()
        image = random_input(shape, self.dtype, 0)
        ms: Counter[str] = Counter()
        for run in range(runs + 1):
            request.infer({0: image})
            for node in request.profiling_info if run else ():
                if not node.real_time:  # fused into another, or no work
                    continue
                word = node.exec_type.rpartition("_")[2]  # "brgemm_avx512_I8": what it computes in
                ms[f"{node.node_type} {word.lower()}"] += node.real_time.total_seconds() * 1000 / runs
        return ms

    def unfused_pairs(self) -> int | None:
        """FakeQuantize nodes that stayed."""
        return sum(ops["FakeQuantize"] for ops in self.placement().values())


def _ports(items: Any) -> list[Port]:
    """Inputs or outputs of an OpenVINO model."""
    found = []
    for item in items:
        sides = [] if item.partial_shape.rank.is_dynamic else item.partial_shape
        shape = tuple(side.get_length() if side.is_static else None for side in sides)
        word = item.element_type.get_type_name()
        found.append(Port(item.get_any_name(), {"f32": "float32", "u8": "uint8"}.get(word, word), shape))
    return found


@functools.cache
def _the_core() -> Any:
    """One core per process, never destroyed before its end.

    Each core gives the thread a stack for signals and, when it dies, puts back the one it found: of two, the second to
    die puts back the freed stack of the first, and the next signal (a data-loading worker that ends) kills the process.
    """
    import openvino

    return openvino.Core()


@functools.cache
def _front_end() -> Any:
    """OpenVINO's reader of .onnx files."""
    from openvino.frontend import FrontEndManager

    return FrontEndManager().load_by_framework("onnx")
