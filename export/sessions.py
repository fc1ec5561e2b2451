"""ONNX Runtime sessions that never fall back: one provider, checked node by node. numpy and onnxruntime only."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim_export.metadata import not_onnx, read_metadata

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
HEAVY = {  # operators whose place decides the speed; shape arithmetic may stay on the CPU
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Attention",
    "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QGemm",
    "DynamicQuantizeMatMul",
}  # fmt: skip


def open_session(model: Path | bytes, provider: str, threads: int, *, profile: str | None = None) -> Any:
    """An onnxruntime session on exactly this provider (CUDA sessions may keep shape arithmetic on the CPU)."""
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise ConfigError(
            f"this onnxruntime has no {wanted}",
            f"it offers {', '.join(ort.get_available_providers())}",
            'pip install "tinymim[gpu]" in place of onnxruntime, or leave --provider out',
        )
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
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = ort.InferenceSession(source, options, providers=[wanted])
    except Exception as error:  # onnxruntime raises several kinds
        raise not_onnx(model if isinstance(model, Path) else "an extracted part", error) from error
    session.disable_fallback()
    if wanted not in session.get_providers():
        raise CheckFailed(
            f"onnxruntime fell back to {', '.join(session.get_providers())}",
            f"{wanted} is installed but could not start (usually a missing CUDA or cuDNN library)",
            "run with ORT's log on (export ORT_LOGGING_LEVEL=0) or python -c 'import onnxruntime; "
            "onnxruntime.preload_dlls()'; or measure with --provider cpu",
        )
    return session


def input_shape(session: Any, path: Path, batch: int, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
    """The shape to run a file at, from its own fixed sides, ``batch``, ``size`` and its metadata."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
        raise ConfigError(
            f"{path.name} does not take one float image batch",
            "its inputs are " + ", ".join(f"{i.name}: {i.type}{i.shape}" for i in inputs),
            "measure a file written by tinymim-export",
        )
    given = inputs[0].shape
    wanted = [batch, 3, *(size or (None, None))]
    if size is None and not all(isinstance(side, int) for side in given[2:]):
        wanted[2:] = read_metadata(session).get("cost", {}).get("size", [None, None])
    out = []
    for axis, (have, want) in enumerate(zip(given, wanted, strict=True)):
        name = ("batch", "channels", "height", "width")[axis]
        if isinstance(have, int) and want is not None and have != want:
            option = "--batch" if axis == 0 else "--size"
            raise ConfigError(
                f"{path.name} has a fixed {name} of {have}, not {want}",
                "it was exported that way",
                f"leave {option} out, or export again with --dynamic",
            )
        side = have if isinstance(have, int) else want
        if side is None:
            raise ConfigError(f"the {name} of {path.name} is free", "any size runs", "add --size H W")
        if side < 1:
            raise ConfigError(f"{name} {side} is not possible", "sizes are whole pixels", "e.g. --size 512 512")
        out.append(int(side))
    return (out[0], out[1], out[2], out[3])


def runner(session: Any, inputs: dict[str, Any], provider: str, seed: int = 0) -> Callable[[], float]:
    """A function that runs once and returns milliseconds; inputs are arrays by name, or one shape under ""."""
    if "" in inputs:
        image = np.random.default_rng(seed).standard_normal(inputs[""]).astype(np.float32)
        inputs = {session.get_inputs()[0].name: image}
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array, provider, 0) for name, array in inputs.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, provider)

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
    """Provider -> operators it runs, after optimisation; from the session, or from a profile on older onnxruntime."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return nodes_by_profile(path, provider, threads, shape)
    placed: dict[str, Counter[str]] = {}
    for share in session.get_provider_graph_assignment_info():
        placed.setdefault(share.ep_name, Counter()).update(node.op_type for node in share.get_nodes())
    return placed


def nodes_by_profile(path: Path, provider: str, threads: int, shape: tuple[int, ...]) -> dict[str, Counter[str]]:
    """The same, read from the profile of one run."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, provider, threads, profile=str(Path(folder) / "profile"))
        session.run(None, {session.get_inputs()[0].name: np.zeros(shape, np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text())
    placed: dict[str, Counter[str]] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and "provider" in about:
            placed.setdefault(about["provider"], Counter())[about["op_name"]] += 1
    return placed


def refuse_fallback(path: Path, provider: str, placed: dict[str, Counter[str]]) -> None:
    """Raise :class:`CheckFailed` where work that matters runs on another provider than the one asked for."""
    wanted = PROVIDERS[provider]
    strayed = {name: {op: n for op, n in ops.items() if op in HEAVY} for name, ops in placed.items() if name != wanted}
    strayed = {name: ops for name, ops in strayed.items() if ops}
    if wanted not in placed or strayed:
        what = "; ".join(f"{name}: {', '.join(f'{n} {op}' for op, n in ops.items())}" for name, ops in strayed.items())
        raise CheckFailed(
            f"{path.name} does not run on {wanted}",
            f"onnxruntime placed nodes elsewhere ({what or ', '.join(placed) or 'no nodes at all'})",
            "use an opset this onnxruntime's provider covers (tinymim-export --opset 20), or --provider cpu",
        )
