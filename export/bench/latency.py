"""How fast is an .onnx file, on this machine, with this runtime? numpy and onnxruntime only; OpenVINO if requested.

Several files (or one file on several runtimes) are timed in turns in one process, the order rotated every round, so a
busy or throttling machine hits all of them alike. Input and outputs stay on the device. Medians and their ratios carry
95 % bootstrap intervals; a series whose second half differs from its first is marked. Peak memory is measured in one
child process per row. Every row is timed with the same engine that ``tinymim eval`` scores.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import cores
from tinymim.progress import say
from tinymim_export.bench.explain import gpus, machine
from tinymim_export.bench.results import JsonResult
from tinymim_export.bench.stats import bootstrap_median, distinguishable, drift, ratio_interval, unsteady
from tinymim_export.bench.timing import MIN_RUNS, interleave, own_peak_mib
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.engines.base import DEFAULT, find_runtime, no_compute_type, renamed
from tinymim_export.runtime.metadata import verified_note
from tinymim_export.tables import markdown_table, text_table

Setting = tuple[str, str | None]  # runtime, compute type


@dataclass
class BenchRow:
    """Figures of one file on one runtime."""

    file: str
    sha256: str
    part: str | None
    verified: bool | None  # the file says so, and its hash agrees (None: it holds none)
    shape: tuple[int, ...]  # of the input
    engine: str  # runtime, provider and compute type, e.g. "openvino cpu bf16"
    provider: str  # its title: "CPUExecutionProvider"
    gpu: str | None  # where the provider runs on one
    threads: int
    runs: int
    p50_ms: float
    p50_interval: tuple[float, float]  # 95 %
    p90_ms: float
    p95_ms: float
    p99_ms: float
    speed_up: tuple[float, float, float] | None  # p50 of the first row over this one's, and its interval
    drift: float  # median of the second half of the runs over that of the first
    steady: bool  # False: the machine was busy or throttling, beyond chance
    images_per_s: float
    peak_mib: float  # host memory of a child process that loads and runs the file
    file_mib: float
    nodes: dict[str, int]  # provider -> graph nodes

    @property
    def differs(self) -> bool:
        """Whether its speed differs from the first row's beyond chance."""
        return self.speed_up is not None and distinguishable(*self.speed_up[1:])


@dataclass
class BenchResult(JsonResult):
    """Latency of several files on one machine; prints, writes JSON and Markdown."""

    kind = "tinymim.bench"

    rows: list[BenchRow]
    splits: list[Any] = field(default_factory=list)  # SplitResult, one per file, if requested
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self) -> list[list[str]]:
        """Heading and one line per row."""
        several = len(self.rows) > 1
        head = [
            "file",
            "input",
            "runtime",
            "p50 ms",
            "95 % interval",
            *(["times as fast as the first"] * several),
            "p90",
            "p95",
            "p99",
            "images/s",
            "peak MiB",
            "file MiB",
            "threads",
            "nodes",
        ]
        lines = [head]
        for row in self.rows:
            times = [f"{ms:.2f}" for ms in (row.p90_ms, row.p95_ms, row.p99_ms)]
            nodes = ", ".join(f"{count} {name.removesuffix('ExecutionProvider')}" for name, count in row.nodes.items())
            sizes = [f"{row.images_per_s:.1f}", f"{row.peak_mib:.0f}", f"{row.file_mib:.1f}"]
            p50 = [f"{row.p50_ms:.2f}", f"{row.p50_interval[0]:.2f} to {row.p50_interval[1]:.2f}"]
            against = [speed_words(row.speed_up)] * several
            name, shape = Path(row.file).name, "x".join(map(str, row.shape))
            lines.append([name, shape, row.engine, *p50, *against, *times, *sizes, str(row.threads), nodes])
        return lines

    def remarks(self) -> list[str]:
        """What makes figures or files doubtful."""
        return [
            f"warning: {Path(row.file).name} ({row.engine}): the second half of the runs took "
            f"{100 * (row.drift - 1):+.0f} % against the first: the machine was busy or throttling; measure again"
            for row in self.rows
            if not row.steady
        ] + [f"note: {note}" for note in self.notes]

    def to_markdown(self) -> str:
        """Tables and the machine they hold for."""
        about = self.environment
        where = f"{about['cpu']}, {about['cores']} cores, onnxruntime {about['versions'].get('onnxruntime')}"
        text = markdown_table(self.table())
        text += f"\nMeasured on {where}; {self.rows[0].runs} runs per file, interleaved.\n"
        text += "".join(f"\n{remark}\n" for remark in self.remarks())
        return text + "".join("\n" + split.to_markdown() for split in self.splits)

    def print(self) -> None:
        """Tables for a terminal."""
        print("\n".join([text_table(self.table()), *self.remarks()]))
        for split in self.splits:
            split.print()


def speed_words(speed_up: tuple[float, float, float] | None) -> str:
    """A ratio and its interval, and whether it can be distinguished from 1."""
    if speed_up is None:
        return "1"
    ratio, low, high = speed_up
    words = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    return words if distinguishable(low, high) else f"{words}: not distinguishable"


@renamed(precision="compute_type")
def bench(
    files: str | Path | Sequence[str | Path],
    *,
    runtime: str | Sequence[str] = DEFAULT,
    provider: str = "cpu",
    compute_type: str | Sequence[str] | None = None,
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
        runtime: One of :data:`tinymim_export.runtime.engines.RUNTIMES`, or several: every file is timed on each.
        provider: ONNX Runtime's: "cpu", "cuda" or "tensorrt". It never falls back to another: that is an error.
        compute_type: What OpenVINO computes in, "f32" (default), "bf16" or both (``precision`` in 0.1).
        threads: CPU threads; None takes every core this process may use.
        batch: Images at once.
        size: Height and width for files with free sizes; None takes the size they were exported at.
        split: Also time backbone, pyramid, head and up-sampling apart (ONNX Runtime only).
        runs: Timed runs per row, 10 or more; None runs for ``seconds``, at least 10 times.
        seconds: Time to spend on each row.
        seed: Of the random input.

    Raises:
        CheckFailed: the provider was not used for everything that matters.
        ConfigError: the runtime or provider is not here, or the files do not allow these options.
        DataError: a file is missing, damaged or not an ONNX file.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not paths:
        raise ConfigError("no files to measure", "the list is empty", "tinymim bench out.onnx")
    for name, value in (("batch", batch), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is not possible", "it is a count", f"give --{name} 1 or more")
    check_time(runs, seconds)
    wanted = settings_of(runtime, compute_type)
    if split and (DEFAULT not in {name for name, _ in wanted}):
        raise ConfigError("--split needs ONNX Runtime", "it times pieces of the graph there", "leave --runtime out")
    threads = threads or cores()
    engines = [
        open_engine(
            path,
            runtime=name,
            provider=_provider_on(name, provider),
            compute_type=word,
            threads=threads,
        )
        for path in paths
        for name, word in wanted
    ]
    shapes = [engine.shape(batch, size) for engine in engines]
    timers = [engine.timer(shape, seed) for engine, shape in zip(engines, shapes, strict=True)]
    nodes = [engine.placement() for engine in engines]
    times = interleave(timers, runs=runs, seconds=seconds)
    rows = [
        bench_row(engine, shape, placed, ms, times[0] if i else None, seed)
        for i, (engine, shape, placed, ms) in enumerate(zip(engines, shapes, nodes, times, strict=True))
    ]
    settings = {
        "runtime": [list(one) for one in wanted],
        "provider": provider,
        "threads": threads,
        "batch": batch,
        "size": size,
        "seed": seed,
    }
    doubts = dict.fromkeys(verified_note(engine.path, engine.meta, engine.verified) for engine in engines)
    result = BenchResult(rows, [], settings, machine(), [note for note in doubts if note])
    if split:
        from tinymim_export.bench.split import split_file

        del engines, timers
        shape_of = dict(zip((row.file for row in rows), shapes, strict=True))
        result.splits = [
            split_file(path, provider=provider, threads=threads, shape=shape_of[str(path)], runs=runs, seconds=seconds)
            for path in paths
        ]
    return result


def check_time(runs: int | None, seconds: float) -> None:
    """Refuse what gives no interval."""
    if runs is not None and runs < MIN_RUNS:
        raise ConfigError(
            f"--runs {runs} is too few", "so few runs do not show how much they vary", f"take {MIN_RUNS} or more"
        )
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds {seconds:g} is not a time", "it is the time for each file", "e.g. --seconds 5")


def settings_of(runtime: str | Sequence[str], compute_type: str | Sequence[str] | None) -> list[Setting]:
    """(runtime, compute type) of every row of a file.

    Raises:
        ConfigError: an unknown runtime, or a compute type where no runtime takes one.
    """
    runtimes = list(dict.fromkeys([runtime] if isinstance(runtime, str) else runtime))
    words = list(dict.fromkeys([compute_type] if isinstance(compute_type, str) else compute_type or []))
    engines = [find_runtime(name) for name in runtimes]
    if words and not any(engine.compute_types for engine in engines):
        raise no_compute_type(" ".join(words), engines[0])
    wanted: list[Setting] = []
    for engine in engines:
        takes = words if engine.compute_types else []
        wanted += [(engine.runtime, word) for word in takes or (None,)]
    return wanted


def _provider_on(runtime: str, wanted: str) -> str:
    """The requested provider; a runtime that has only one is timed on that one."""
    only = find_runtime(runtime).providers
    return only[0].name if len(only) == 1 else wanted


def bench_row(
    engine: Engine,
    shape: tuple[int, ...],
    placed: dict[str, Any],
    ms: Sequence[float],
    first: Sequence[float] | None,
    seed: int = 0,
) -> BenchRow:
    """Figures of one series of times; ``first``: the times of the first row, measured in turns with these."""
    p50, p90, p95, p99 = (float(np.percentile(ms, q)) for q in (50, 90, 95, 99))
    return BenchRow(
        file=str(engine.path),
        sha256=engine.sha256,
        part=engine.meta.get("part"),
        verified=engine.verified,
        shape=shape,
        engine=engine.label,
        provider=engine.place.title,
        gpu=None if engine.place.device == "cpu" else gpus(),
        threads=engine.threads,
        runs=len(ms),
        p50_ms=p50,
        p50_interval=bootstrap_median(ms, seed),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        speed_up=None if first is None else ratio_interval(first, ms, seed),
        drift=drift(ms, seed)[0],
        steady=not unsteady(ms, seed),
        images_per_s=shape[0] * 1000 / float(np.mean(ms)),
        peak_mib=peak_memory(engine, shape),
        file_mib=engine.path.stat().st_size / 2**20,
        nodes={name: sum(ops.values()) for name, ops in placed.items()},
    )


def peak_memory(engine: Engine, shape: tuple[int, ...]) -> float:
    """Peak host memory in MiB of a child process that opens the same file the same way and runs it three times."""
    how = {name: getattr(engine, name) for name in ("runtime", "provider", "compute_type", "threads")}
    home = type(engine).__module__  # a runtime from outside registers itself there
    command = [sys.executable, "-m", __name__, str(engine.path), home, json.dumps(how), json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TinyMIMError(
            f"the memory measurement of {engine.path.name} failed", lines[-1][:300], "free some memory and try again"
        )
    return float(done.stdout.strip().splitlines()[-1])


def _child(argv: Sequence[str]) -> None:
    """Body of the child process: print its peak memory in MiB."""
    path, home, how, shape = argv
    importlib.import_module(home)
    once = open_engine(path, **json.loads(how)).timer(tuple(json.loads(shape)))
    for _ in range(3):
        once()
    say(own_peak_mib())


if __name__ == "__main__":
    _child(sys.argv[1:])
