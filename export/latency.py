"""How fast is an .onnx file, on this machine, with this provider? Needs numpy and onnxruntime only.

Several files are timed in turns in one process (order rotated every round), so a busy or throttling machine hits all of
them alike. Input and outputs stay on the device. Peak memory is measured in one child process a file.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tinymim.errors import CheckFailed, ConfigError, DataError, TinyMIMError
from tinymim.files import environment, sha256_file, write_json
from tinymim_export.metadata import not_onnx, read_metadata

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
HEAVY = {  # operators whose place decides the speed; shape arithmetic may stay on the CPU
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Attention",
    "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QGemm", "DynamicQuantizeMatMul",
}  # fmt: skip
MIN_RUNS = 10


@dataclass
class BenchRow:
    """Figures of one file."""

    file: str
    sha256: str
    part: str | None
    verified: bool | None  # what the file says of itself
    shape: tuple[int, ...]  # of the input
    provider: str
    threads: int
    runs: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    peak_mib: float  # host memory of a child process that loads and runs the file
    file_mib: float
    nodes: dict[str, int]  # provider -> graph nodes, after ONNX Runtime's optimisation


@dataclass
class BenchResult:
    """Latency of several files on one machine; prints, writes JSON and Markdown."""

    rows: list[BenchRow]
    splits: list[Any] = field(default_factory=list)  # SplitResult, one a file, where asked for
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = asdict(self)
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def table(self) -> list[list[str]]:
        """Heading and one line a file."""
        head = ["file", "input", "p50 ms", "p90", "p95", "p99", "images/s", "peak MiB", "file MiB", "threads", "nodes"]
        lines = [head]
        for row in self.rows:
            times = [f"{ms:.2f}" for ms in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms)]
            nodes = ", ".join(f"{count} {name.removesuffix('ExecutionProvider')}" for name, count in row.nodes.items())
            lines.append(
                [Path(row.file).name, "x".join(map(str, row.shape)), *times, f"{row.images_per_s:.1f}"]
                + [f"{row.peak_mib:.0f}", f"{row.file_mib:.1f}", str(row.threads), nodes]
            )
        return lines

    def to_markdown(self) -> str:
        """Tables and the machine they hold for."""
        versions = self.environment["versions"]
        where = f"{self.environment['cpu']}, {self.environment['cores']} cores, onnxruntime {versions.get('onnxruntime')}"
        text = markdown_table(self.table()) + f"\nMeasured on {where}; {self.rows[0].runs} runs a file, interleaved.\n"
        return text + "".join("\n" + split.to_markdown() for split in self.splits)

    def print(self) -> None:
        """Tables for a terminal."""
        print(text_table(self.table()))
        for split in self.splits:
            split.print()


def bench(
    files: str | Path | Sequence[str | Path],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    split: bool = False,
    runs: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
) -> BenchResult:
    """Measure .onnx files.

    Args:
        files: One path or several.
        provider: "cpu" or "cuda". Never falls back: that is an error.
        threads: CPU threads; None takes every core this process may use.
        batch: Images at once.
        size: Height and width for files with free sizes; None takes the size they were exported at.
        split: Also time backbone, pyramid, head and up-sampling apart (needs onnx).
        runs: Timed runs a file; None runs for ``seconds``, at least 10 times.
        seconds: Time to spend on each file.
        seed: Of the random input.

    Raises:
        CheckFailed: the provider was not used for everything that matters.
        ConfigError: no such provider here, or options the files do not allow.
        DataError: a file that is missing, damaged or no ONNX file.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise ConfigError("no files to measure", "the list is empty", "tinymim bench out.onnx")
    if provider not in PROVIDERS:
        raise ConfigError(f"provider {provider!r} is unknown", f"known: {', '.join(PROVIDERS)}", "choose one of them")
    for name, value in (("batch", batch), ("threads", threads), ("runs", runs)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is not possible", "it counts something", f"give --{name} 1 or more")
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    opened = [open_session(path, provider, threads) for path in paths]
    shapes = [input_shape(session, path, batch, size) for session, path in zip(opened, paths, strict=True)]
    nodes = [nodes_per_provider(s, p, provider, threads, x) for s, p, x in zip(opened, paths, shapes, strict=True)]
    for path, count in zip(paths, nodes, strict=True):
        refuse_fallback(path, provider, count)
    runners = [runner(session, {"": shape}, provider, seed) for session, shape in zip(opened, shapes, strict=True)]
    times = interleave(runners, runs=runs, seconds=seconds)
    rows = []
    for path, session, shape, placed, ms in zip(paths, opened, shapes, nodes, times, strict=True):
        meta = read_metadata(session)
        p50, p90, p95, p99 = (float(np.percentile(ms, q)) for q in (50, 90, 95, 99))
        rows.append(
            BenchRow(
                file=str(path),
                sha256=sha256_file(path),
                part=meta.get("part"),
                verified=meta.get("verified"),
                shape=shape,
                provider=PROVIDERS[provider],
                threads=threads,
                runs=len(ms),
                p50_ms=p50,
                p90_ms=p90,
                p95_ms=p95,
                p99_ms=p99,
                images_per_s=batch * 1000 / float(np.mean(ms)),
                peak_mib=peak_memory(path, provider, threads, shape),
                file_mib=path.stat().st_size / 2**20,
                nodes={name: sum(ops.values()) for name, ops in placed.items()},
            )
        )
    settings = {"provider": provider, "threads": threads, "batch": batch, "size": size, "seconds": seconds, "seed": seed}
    result = BenchResult(rows, [], settings, environment())
    if split:
        from tinymim_export.split import split_file

        del opened, runners
        result.splits = [
            split_file(path, provider=provider, threads=threads, shape=shape, runs=runs, seconds=seconds)
            for path, shape in zip(paths, shapes, strict=True)
        ]
    return result


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


def interleave(
    runners: Sequence[Callable[[], float]], *, runs: int | None, seconds: float, warm_up: float = 0.5
) -> list[list[float]]:
    """Milliseconds of every runner, in turns; warm-up (at least twice, half a second) not counted."""
    for once in runners:
        began, count = time.monotonic(), 0
        while count < 2 or time.monotonic() - began < warm_up:
            once()
            count += 1
    times: list[list[float]] = [[] for _ in runners]
    began, turn = time.monotonic(), 0
    while turn < (runs or MIN_RUNS) or (runs is None and time.monotonic() - began < seconds * len(runners)):
        for i in range(len(runners)):
            at = (i + turn) % len(runners)
            times[at].append(runners[at]())
        turn += 1
    return times


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


def peak_memory(path: Path, provider: str, threads: int, shape: tuple[int, ...]) -> float:
    """Peak host memory in MiB of a child process that opens the file and runs it three times."""
    command = [sys.executable, "-m", "tinymim_export.latency", str(path), provider, str(threads), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TinyMIMError(
            f"the memory measurement of {path.name} failed", lines[-1][:300], "free some memory and try again"
        )
    return float(done.stdout.strip().splitlines()[-1])


def _child(argv: Sequence[str]) -> None:
    """Body of the child process: print its peak memory in MiB."""
    path, provider, threads, shape = argv
    once = runner(open_session(Path(path), provider, int(threads)), {"": tuple(json.loads(shape))}, provider)
    for _ in range(3):
        once()
    try:  # not ru_maxrss: on Linux that starts at the parent's size
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        peak = int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(peak)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of a heading and rows."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


if __name__ == "__main__":
    _child(sys.argv[1:])
