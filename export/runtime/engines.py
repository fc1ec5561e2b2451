"""One opened .onnx file on one runtime: what is scored is what is timed. numpy and onnxruntime; OpenVINO if asked for.

ONNX Runtime runs a file as it is. OpenVINO can run the same FP32 file with bfloat16 arithmetic (``precision="bf16"``)
where the processor has it: a setting of the session, not another file.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, DataError
from tinymim.files import cores, sha256_file
from tinymim_export.runtime.metadata import first_line, read_metadata
from tinymim_export.runtime.sessions import IMAGES, nodes_per_provider, open_session, refuse_fallback, runner

RUNTIMES = ("onnxruntime", "openvino")
OPENVINO_PRECISIONS = ("f32", "bf16")


class Engine:
    """A file opened on one runtime; nothing falls back to another one silently.

    Attributes:
        path: The .onnx file.
        sha256: Of the file.
        meta: Its ``tinymim.*`` metadata; empty for files of others.
        runtime: "onnxruntime" or "openvino".
        provider: "cpu", "cuda" or "tensorrt".
        precision: Arithmetic asked of OpenVINO, "f32" or "bf16"; None under ONNX Runtime.
        threads: CPU threads.
        size: Height and width fixed in the file, None where free.
        output: Name of its first output.
    """

    runtime = "onnxruntime"
    precision: str | None = None

    def __init__(self, path: Path, provider: str, threads: int) -> None:
        self.path, self.provider, self.threads = path, provider, threads
        self.session = open_session(path, provider, threads)
        self.sha256 = sha256_file(path)
        self.meta = read_metadata(self.session)
        given = self.session.get_inputs()
        if len(given) != 1 or len(given[0].shape) != 4 or given[0].type not in IMAGES:
            raise ConfigError(
                f"{path.name} does not take one image batch",
                "its inputs are " + ", ".join(f"{i.name}: {i.type}{i.shape}" for i in given),
                "use a file written by tinymim-export",
            )
        self.input = given[0].name
        self.dtype = np.dtype(IMAGES[given[0].type])
        self.given = tuple(side if isinstance(side, int) else None for side in given[0].shape)
        self.size = self.given[2:]
        self.output = self.session.get_outputs()[0].name

    @property
    def label(self) -> str:
        """Runtime, provider and arithmetic in words, e.g. "openvino cpu bf16"."""
        return " ".join(filter(None, (self.runtime, self.provider, self.precision)))

    def run(self, images_N3HW: np.ndarray) -> np.ndarray:
        """The first output for a batch: float32 normalised, or uint8 pixels where the metadata's ``input`` says so.

        Raises:
            ConfigError: the graph cannot take this size.
        """
        sides = zip(self.size, images_N3HW.shape[2:], strict=True)
        if any(fixed not in (None, side) for fixed, side in sides):
            raise cannot_run(self.path, images_N3HW.shape, self.size, "another size")
        try:
            return self._run(np.ascontiguousarray(images_N3HW, self.dtype))
        except Exception as error:  # the runtimes raise several kinds
            raise cannot_run(self.path, images_N3HW.shape, self.size, error) from error

    def shape(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
        """The shape to run at: the file's fixed sides, else ``batch`` and ``size``, else the size of its export.

        Raises:
            ConfigError: another size than the file's, or a free one that nothing names.
        """
        traced = (self.meta.get("cost") or {}).get("size") or (None, None)
        wanted = (batch, 3, *(size or (fixed or side for fixed, side in zip(self.size, traced, strict=True))))
        out = []
        for name, have, want in zip(("batch", "channels", "height", "width"), self.given, wanted, strict=True):
            if have is not None and want not in (None, have):
                raise ConfigError(
                    f"{self.path.name} has a fixed {name} of {have}, not {want}",
                    "it was exported that way",
                    f"leave --{'batch' if name == 'batch' else 'size'} out, or export again with --dynamic",
                )
            side = want if have is None else have
            if side is None:
                raise ConfigError(f"the {name} of {self.path.name} is free", "any size runs", "add --size H W")
            if side < 1:
                raise ConfigError(f"{name} {side} is not possible", "sizes are whole pixels", "e.g. --size 512 512")
            out.append(int(side))
        return (out[0], out[1], out[2], out[3])

    def _some_shape(self) -> tuple[int, int, int, int]:
        """A shape the file takes, for looking at its graph only."""
        free = any(side is None for side in self.size) and not self.meta.get("cost")
        return self.shape(self.given[0] or 1, (64, 64) if free else None)

    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        return self.session.run([self.output], {self.input: images_N3HW})[0]

    def timer(self, shape: tuple[int, ...], seed: int = 0) -> Callable[[], float]:
        """A function that runs once on a random input held on the device and returns milliseconds.

        Raises:
            ConfigError: the graph cannot take this shape.
        """
        once = runner(self.session, {self.input: random_input(shape, self.dtype, seed)}, self.provider)
        try:
            once()
        except Exception as error:  # onnxruntime raises several kinds
            raise cannot_run(self.path, shape, self.size, error) from error
        return once

    def placement(self) -> dict[str, Counter[str]]:
        """Provider -> operators it runs; see :func:`tinymim_export.runtime.sessions.nodes_per_provider`.

        Raises:
            CheckFailed: work that matters runs on another provider than the one asked for.
        """
        placed = nodes_per_provider(self.session, self.path, self.provider, self.threads, self._some_shape())
        refuse_fallback(self.path, self.provider, placed)
        return placed


class OpenVINOEngine(Engine):
    """The same file under OpenVINO, compiled for every input shape it meets."""

    runtime = "openvino"

    def __init__(self, path: Path, provider: str, threads: int, precision: str) -> None:
        self.precision = precision
        self.core = openvino_core(precision)
        super().__init__(path, "cpu", threads)  # reads inputs and metadata
        del self.session
        self.compiled: dict[tuple[int, ...], Any] = {}

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
        except RuntimeError as error:  # ONNX Runtime has opened the file: it is not damaged
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
        """Properties given to OpenVINO, recorded with every result."""
        return {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }

    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        request = self.compile(images_N3HW.shape).create_infer_request()
        return np.array(request.infer({0: images_N3HW})[0])

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
        shape = next(iter(self.compiled), self._some_shape())
        nodes = self.compile(shape).get_runtime_model().get_ops()
        ops = Counter(node.get_rt_info()["layerType"].astype(str) for node in nodes)
        for no_work in ("Const", "Input", "Output"):
            del ops[no_work]
        return {"OpenVINO CPU": ops}


def open_engine(
    path: str | Path,
    *,
    runtime: str = "onnxruntime",
    provider: str = "cpu",
    precision: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open a file.

    Args:
        path: The .onnx file.
        runtime: "onnxruntime" or "openvino".
        provider: ONNX Runtime's: "cpu", "cuda" or "tensorrt".
        precision: OpenVINO's arithmetic: "f32" (default) or "bf16".
        threads: CPU threads; None takes every core this process may use.

    Raises:
        ConfigError: runtime, provider or precision that is not here or do not belong together.
        DataError: missing or damaged file.
    """
    path = Path(path)
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime {runtime!r} is unknown", f"known: {', '.join(RUNTIMES)}", "choose one of them")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads} is not possible", "at least one computes", "leave it out: every core")
    threads = threads or cores()
    if runtime == "onnxruntime":
        if precision is not None:
            raise ConfigError(
                f"--precision {precision} is a setting of OpenVINO",
                "ONNX Runtime computes in the precision of the file",
                "add --runtime openvino, or export the precision: tinymim-export --precision int8",
            )
        return Engine(path, provider, threads)
    if provider != "cpu":
        raise ConfigError(f"OpenVINO has no provider {provider!r}", "we run it on the CPU", "leave --provider out")
    if precision not in (None, *OPENVINO_PRECISIONS):
        raise ConfigError(
            f"precision {precision!r} is unknown", f"OpenVINO takes {', '.join(OPENVINO_PRECISIONS)}", "choose one"
        )
    return OpenVINOEngine(path, "cpu", threads, precision or "f32")


def openvino_core(precision: str) -> Any:
    """OpenVINO's core, after checking that it can do ``precision`` on this processor."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "OpenVINO is not installed", "--runtime openvino needs it", 'pip install "tinymim[openvino]"'
        ) from error
    core = _the_core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in able:
        raise ConfigError(
            "this processor has no bfloat16 arithmetic",
            f"OpenVINO offers {', '.join(able)} here; a bf16 figure would be an emulation's",
            "leave --precision out, or measure on a processor with AMX or AVX512-BF16",
        )
    return core


@functools.cache
def _the_core() -> Any:
    """One core a process, never destroyed before its end.

    Each core gives the thread a stack for signals and, when it dies, puts back the one it found: of two, the second to
    die puts back the freed stack of the first, and the next signal (a data-loading worker that ends) kills the process.
    """
    import openvino

    return openvino.Core()


def random_input(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Normal float32 noise, or uniform uint8 pixels."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype) == np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape).astype(np.float32)


def cannot_run(path: Path, shape: tuple[int, ...], size: tuple[int | None, ...], error: object) -> Exception:
    """The error for an input the graph does not take."""
    text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    fixed = "x".join("any" if side is None else str(side) for side in size)
    if isinstance(error, ConfigError | DataError):
        return error
    return ConfigError(
        f"{path.name} cannot run an input of {'x'.join(map(str, shape))}",
        f"its height and width are {fixed} ({text})",
        "use the size it was exported at, or export again with --dynamic",
    )
