"""Why a file is as fast as it is: what the processor can do, where the time goes, what quantisation left undone.

numpy and onnxruntime; counting unfused pairs also needs onnx.
"""

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.files import environment
from tinymim_export.runtime.engines import Engine

FEATURES = {  # what makes integer and short-float products fast -> Linux's names of it
    "AVX2": {"avx2"},
    "AVX512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AVX512-BF16": {"avx512_bf16"},
    "AMX-INT8": {"amx_int8"},
    "AMX-BF16": {"amx_bf16"},
}


@dataclass(frozen=True)
class OperatorTime:
    """One kind of operator: its share of the time (0 to 1) and milliseconds of one run."""

    operator: str
    share: float
    ms: float

    def __str__(self) -> str:
        return f"{self.operator} {100 * self.share:.0f} %"


def cpu_features(cpuinfo: str | None = None) -> dict[str, bool] | None:
    """Which of :data:`FEATURES` this x86 processor has; None where that is unknown (other systems and processors).

    Args:
        cpuinfo: Text of /proc/cpuinfo; None reads it.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text("utf-8-sig")
        except OSError:
            return None
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if line is None:
        return None
    flags = set(line.partition(":")[2].split())
    return {name: bool(names & flags) for name, names in FEATURES.items()}


def gpus() -> str | None:
    """Names and driver of NVIDIA GPUs, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "; ".join(done.stdout.split("\n")).strip("; ") or None if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """The stamp of every measurement: :func:`tinymim.files.environment`, CPU features and GPUs."""
    return environment() | {"machine": platform.machine(), "cpu_features": cpu_features(), "gpus": gpus()}


def top_operators(engine: Engine, shape: tuple[int, ...], n: int = 5, runs: int = 5) -> list[OperatorTime]:
    """The kinds of operators that take the most time, from the runtime's own profile (in a session of its own).

    Args:
        engine: The file on its runtime.
        shape: Of the input.
        n: How many.
        runs: Profiled runs after one that does not count.
    """
    ms = engine.operator_times(tuple(shape), runs)
    total = sum(ms.values()) or 1.0
    return [OperatorTime(name, took / total, took) for name, took in ms.most_common(n)]


def unfused_pairs(engine: Engine) -> int | None:
    """Quantised tensors that go straight back to float after the runtime's optimisation; None: it cannot say.

    Such a pair (QuantizeLinear into DequantizeLinear; under OpenVINO a FakeQuantize that stayed) rounds a tensor and
    computes on in float: it costs time and accuracy and gains nothing.
    """
    return engine.unfused_pairs()


def facts(engine: Engine, shape: tuple[int, ...]) -> dict[str, Any]:
    """What decides the speed of a file: nodes per provider, unfused pairs, CPU features, top operators."""
    return {
        "nodes": {name: sum(ops.values()) for name, ops in engine.placement().items()},
        "unfused_pairs": unfused_pairs(engine),
        "cpu_features": cpu_features(),
        "top_operators": [[top.operator, top.share] for top in top_operators(engine, shape)],
    }
