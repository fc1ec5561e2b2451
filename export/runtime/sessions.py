"""ONNX Runtime sessions that never fall back: one provider, checked node by node. numpy and onnxruntime only.

onnxruntime and numpy are imported when a session is opened: the command line reads :data:`PROVIDERS` and needs no more.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim_export.runtime.metadata import not_onnx
from tinymim_export.runtime.providers import Provider

if TYPE_CHECKING:
    import numpy as np

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("cpu", "CPUExecutionProvider", target="onnxruntime"),
        Provider("cuda", "CUDAExecutionProvider", target="cuda", device="cuda"),
        Provider("tensorrt", "TensorrtExecutionProvider", target="tensorrt", device="cuda"),
    )
}
IMAGES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}  # normalised, or pixels
HEAVY = {  # operators whose place decides the speed; shape arithmetic may stay on the CPU
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "Attention",
    "MultiHeadAttention",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulInteger",
    "ConvInteger",
    "QGemm",
    "DynamicQuantizeMatMul",
}


def open_session(
    model: Path | bytes, provider: str, threads: int, *, profile: str | None = None, optimised: Path | None = None
) -> Any:
    """An onnxruntime session on exactly this provider (GPU sessions may keep shape arithmetic on the CPU).

    Raises:
        CheckFailed: the provider is here but could not start.
        ConfigError: no such provider here.
        DataError: a file that is missing, damaged, or too new for this onnxruntime.
    """
    import onnxruntime as ort

    wanted = require_provider(provider)
    if isinstance(model, Path) and not model.is_file():
        raise DataError(f"no file at {model}", "it does not exist", "check the path")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # an idle session must not disturb the others
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if optimised is not None:  # onnxruntime writes the graph it runs there
        options.optimized_model_filepath = str(optimised)
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=[wanted])
    except Exception as error:  # onnxruntime raises several kinds
        raise cannot_open(model if isinstance(model, Path) else "an extracted part", error) from error
    session.disable_fallback()
    if wanted not in session.get_providers():
        raise CheckFailed(
            f"onnxruntime fell back to {', '.join(session.get_providers())}",
            f"{wanted} is installed but could not start (usually a missing CUDA, cuDNN or TensorRT library)",
            "run with ORT's log on (export ORT_LOGGING_LEVEL=0) or python -c 'import onnxruntime; "
            "onnxruntime.preload_dlls()'; or measure with --provider cpu",
        )
    return session


def require_provider(provider: str) -> str:
    """The execution provider's name, e.g. "CUDAExecutionProvider".

    Raises:
        ConfigError: it is unknown, or this onnxruntime has none.
    """
    import onnxruntime as ort

    if provider not in PROVIDERS:
        raise ConfigError(f"provider {provider!r} is unknown", f"known: {', '.join(PROVIDERS)}", "choose one of them")
    wanted = PROVIDERS[provider].title
    if wanted not in ort.get_available_providers():
        raise ConfigError(
            f"this onnxruntime has no {wanted}",
            f"it offers {', '.join(ort.get_available_providers())}",
            'pip install "tinymim[gpu]" in place of onnxruntime, or leave --provider out',
        )
    return wanted


def cannot_open(path: str | Path, error: object) -> DataError:
    """The error for a file onnxruntime refuses: damaged, or written for a newer onnxruntime (its words are matched)."""
    import onnxruntime as ort

    text = str(error)
    newer = (
        r"(Opset \d+) is under development.*?(till opset \d+)",
        r"Unsupported model (IR version: \d+), (max supported IR version: \d+)",
        r"(No Op registered for \S+)(?: with domain_version of (\d+))?",
        r"(\S+) is not a registered function/op()",
    )
    for pattern in newer:
        if found := re.search(pattern, text, re.DOTALL):
            needs, has = found.group(1), found.group(2)
            return DataError(
                f"{path} needs more than onnxruntime {ort.__version__} has",
                f"{needs}{f' ({has})' if has else ''}",
                "pip install -U onnxruntime, or export again with an older operator set: tinymim-export --opset 20",
            )
    return not_onnx(path, error)


def runner(session: Any, inputs: dict[str, np.ndarray], provider: str) -> Callable[[], float]:
    """A function that runs once and returns milliseconds; inputs (by name) and outputs stay on the device."""
    import onnxruntime as ort

    device = PROVIDERS[provider].device
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in inputs.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def once() -> float:
        began = time.perf_counter_ns()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return (time.perf_counter_ns() - began) / 1e6

    once.held = held  # type: ignore[attr-defined]  # the bound inputs must outlive the binding
    return once


def nodes_per_provider(
    session: Any, path: Path, provider: str, threads: int, shape: tuple[int, ...]
) -> dict[str, Counter[str]]:
    """Provider -> operators given to it (before it fuses them); from the session, or from a profile where onnxruntime
    is too old to say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return nodes_by_profile(path, provider, threads, shape)
    placed: dict[str, Counter[str]] = {}
    for share in session.get_provider_graph_assignment_info():
        placed.setdefault(share.ep_name, Counter()).update(node.op_type for node in share.get_nodes())
    return placed


def nodes_by_profile(path: Path, provider: str, threads: int, shape: tuple[int, ...]) -> dict[str, Counter[str]]:
    """The same, read from the profile of one run (after fusion)."""
    placed: dict[str, Counter[str]] = {}
    for about, _ in profile(path, provider, threads, shape, runs=1):
        placed.setdefault(about["provider"], Counter())[about["op_name"]] += 1
    return placed


def profile(
    path: Path, provider: str, threads: int, shape: tuple[int, ...], runs: int
) -> list[tuple[dict[str, Any], float]]:
    """What onnxruntime says of every node it ran ("op_name", "provider", ...) and its ms, ``runs`` times each.

    A first run is left out where ``runs`` is more than one.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, provider, threads, profile=str(Path(folder) / "profile"))
        image = session.get_inputs()[0]
        for _ in range(runs + (runs > 1)):
            session.run(None, {image.name: np.zeros(shape, IMAGES[image.type])})
        events = json.loads(Path(session.end_profiling()).read_text("utf-8-sig"))
    nodes = [
        (event["args"], event["dur"] / 1000)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and "provider" in event.get("args", {})
    ]
    return nodes[len(nodes) // (runs + 1) :] if runs > 1 else nodes


def refuse_fallback(path: Path, provider: str, placed: dict[str, Counter[str]]) -> None:
    """Raise :class:`CheckFailed` if work that matters runs on another provider than the requested one."""
    wanted = PROVIDERS[provider].title
    strayed = {name: {op: n for op, n in ops.items() if op in HEAVY} for name, ops in placed.items() if name != wanted}
    strayed = {name: ops for name, ops in strayed.items() if ops}
    if wanted not in placed or strayed:
        what = "; ".join(f"{name}: {', '.join(f'{n} {op}' for op, n in ops.items())}" for name, ops in strayed.items())
        raise CheckFailed(
            f"{path.name} does not run on {wanted}",
            f"onnxruntime placed nodes elsewhere ({what or ', '.join(placed) or 'no nodes at all'})",
            "use an opset this onnxruntime's provider covers (tinymim-export --opset 20), or --provider cpu",
        )
