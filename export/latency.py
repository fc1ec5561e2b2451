"""How fast is an .onnx file, on this machine, with this provider? Needs numpy and onnxruntime only.

Several files are timed in turns in one process (order rotated every round), so a busy or throttling machine hits all of
them alike. Input and outputs stay on the device. Peak memory is measured in one child process a file.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import environment, sha256_file, write_json
from tinymim_export.metadata import read_metadata
from tinymim_export.sessions import PROVIDERS, input_shape, nodes_per_provider, open_session, refuse_fallback, runner
from tinymim_export.tables import markdown_table, text_table

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
            sizes = [f"{row.images_per_s:.1f}", f"{row.peak_mib:.0f}", f"{row.file_mib:.1f}"]
            lines.append([Path(row.file).name, "x".join(map(str, row.shape)), *times, *sizes, str(row.threads), nodes])
        return lines

    def to_markdown(self) -> str:
        """Tables and the machine they hold for."""
        about = self.environment
        where = f"{about['cpu']}, {about['cores']} cores, onnxruntime {about['versions'].get('onnxruntime')}"
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
    settings = {"provider": provider, "threads": threads, "batch": batch, "size": size, "seed": seed}
    result = BenchResult(rows, [], settings, environment())
    if split:
        from tinymim_export.split import split_file

        del opened, runners
        result.splits = [
            split_file(path, provider=provider, threads=threads, shape=shape, runs=runs, seconds=seconds)
            for path, shape in zip(paths, shapes, strict=True)
        ]
    return result


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


if __name__ == "__main__":
    _child(sys.argv[1:])
