"""Where a file's time goes: each kind of operator, beside what this machine's matrix products would need for it.

The matrix rate is measured with the same runtime, compute type and threads: a file of nothing but products of large
matrices, in float and with Q/DQ pairs, run in turns with the file. numpy and onnxruntime only; OpenVINO if requested.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.bench.explain import OperatorTime, machine, top_operators
from tinymim_export.bench.graph_parts import Node, Piece
from tinymim_export.bench.latency import check_time, settings_of
from tinymim_export.bench.results import JsonResult
from tinymim_export.bench.timing import interleave
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.engines.base import DEFAULT
from tinymim_export.runtime.wire import wire_field
from tinymim_export.tables import markdown_table, text_table

SIDE, PRODUCTS = 1024, 3  # of the matrices that give the rate: (3 SIDE, SIDE) x (SIDE, SIDE), PRODUCTS in a row


@dataclass
class ExplainRow:
    """One file on one runtime.

    Attributes:
        p50_ms: Of the whole file, without profiling.
        operators: Kinds, the slowest first; from the runtime's profile, whose counters cost some time themselves.
        gflop: Of the products of one run, 2 for a multiply-add; None where the file does not say.
        rates: "float" (the compute type of the runtime) and "int8" -> GFLOP/s of large products.
    """

    file: str
    sha256: str
    engine: str
    threads: int
    shape: tuple[int, ...]
    p50_ms: float
    operators: list[OperatorTime]
    gflop: float | None
    rates: dict[str, float]

    @property
    def least_ms(self) -> dict[str, float]:
        """What all products would take at each rate."""
        return {} if self.gflop is None else {word: 1e3 * self.gflop / rate for word, rate in self.rates.items()}

    def about(self) -> list[str]:
        """Sentences beside the table."""
        rates = ", ".join(f"{rate:.0f} GFLOP/s in {word}" for word, rate in self.rates.items())
        lines = [f"{Path(self.file).name} on {self.engine}: {self.p50_ms:.2f} ms; large products reach {rates} here"]
        if self.gflop is not None:
            least = ", ".join(
                f"{ms:.1f} ms in {word} ({100 * ms / self.p50_ms:.0f} % of its time)"
                for word, ms in self.least_ms.items()
            )
            done = 1e3 * self.gflop / self.p50_ms
            lines.append(
                f"its products are {self.gflop:.1f} GFLOP, {done:.0f} GFLOP/s reached; at those rates: {least}"
            )
        return lines


@dataclass
class ExplainResult(JsonResult):
    """Several rows; prints, writes JSON and Markdown."""

    kind = "tinymim.explain"

    rows: list[ExplainRow]
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def table(row: ExplainRow) -> list[list[str]]:
        """Heading and one line per kind of operator."""
        lines = [["operator", "ms", "share"]]
        return lines + [[one.operator, f"{one.ms:.2f}", f"{100 * one.share:.1f} %"] for one in row.operators]

    def to_markdown(self) -> str:
        """Tables, sentences and the machine they hold for."""
        text = "".join("\n".join([*row.about(), "", markdown_table(self.table(row)), ""]) for row in self.rows)
        return text + f"Measured on {self.environment['cpu']}, {self.rows[0].threads} threads.\n"

    def print(self) -> None:
        """The same for a terminal."""
        for row in self.rows:
            print("\n".join([*row.about(), text_table(self.table(row))]))


def explain(
    files: Sequence[str | Path],
    *,
    runtime: str | Sequence[str] = DEFAULT,
    compute_type: str | Sequence[str] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    runs: int | None = None,
    seconds: float = 5.0,
) -> ExplainResult:
    """Profile files, and measure this machine's matrix rate beside them.

    Args:
        files: .onnx files.
        runtime, compute_type, provider, threads: As in :func:`tinymim_export.bench.latency.bench`.
        runs: Timed runs; None: what ``seconds`` allows, at least 10.
        seconds: Time for each file and each rate.

    Raises:
        ConfigError: no files, or options that do not fit.
        DataError: a file that is missing or damaged.
    """
    check_time(runs, seconds)
    if not files:
        raise ConfigError("no files to explain", "the list is empty", "tinymim bench FILE.onnx --explain")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for word in ("float", "int8"):
            Path(folder, f"{word}.onnx").write_bytes(products_file(word == "int8"))
        for name, word in settings_of(runtime, compute_type):
            how = dict(runtime=name, provider=provider, compute_type=word, threads=threads)
            known = {rate: open_engine(Path(folder, f"{rate}.onnx"), **how) for rate in ("float", "int8")}
            rows += [_row(open_engine(file, **how), known, runs, seconds) for file in files]
    return ExplainResult(rows, machine())


def _row(engine: Engine, known: dict[str, Engine], runs: int | None, seconds: float) -> ExplainRow:
    shape = engine.shape()
    timers = [engine.timer(shape), *(each.timer((1, 3, SIDE, SIDE)) for each in known.values())]
    own, *others = (float(np.median(ms)) for ms in interleave(timers, runs=runs, seconds=seconds))
    cost = engine.meta.get("cost") or {}
    counted = cost.get("macs") if tuple(cost.get("size") or ()) == tuple(shape[2:]) else None
    label, gflop = engine.compute_type or "f32", PRODUCTS * 2 * 3 * SIDE**3 / 1e9
    return ExplainRow(
        file=str(engine.path),
        sha256=engine.sha256,
        engine=engine.label,
        threads=engine.threads,
        shape=shape,
        p50_ms=own,
        operators=top_operators(engine, shape, n=1000, runs=10),
        gflop=None if counted is None else 2 * shape[0] * counted / 1e9,
        rates={label if w == "float" else w: 1e3 * gflop / ms for w, ms in zip(known, others, strict=True)},
    )


def products_file(int8: bool) -> bytes:
    """A .onnx file of :data:`PRODUCTS` products in a row: image (1, 3, SIDE, SIDE) x constant matrices."""
    random = np.random.default_rng(0)
    nodes: list[Node] = []
    constants: list[bytes] = []

    def add(kind: str, inputs: list[str], output: str) -> str:
        texts = [(1, name) for name in inputs] + [(2, output), (3, output), (4, kind)]
        nodes.append(Node(b"".join(wire_field(at, text) for at, text in texts), inputs, [output]))
        return output

    def constant(name: str, value: Any) -> str:
        code = {"float32": 1, "uint8": 2, "int8": 3}[str(value.dtype)]
        dims = b"".join(wire_field(1, side) for side in value.shape)
        constants.append(dims + wire_field(2, code) + wire_field(8, name) + wire_field(9, value.tobytes()))
        return name

    step, middle = constant("step", np.float32(1 / 32)), constant("middle", np.uint8(128))
    scale = np.float32(1 / (36 * SIDE**0.5))  # values keep their size from product to product
    fine, zero = constant("fine", scale), constant("zero", np.int8(0))
    now = "image"
    for i in range(PRODUCTS):
        levels = random.integers(-63, 64, (SIDE, SIDE)).astype(np.int8)
        if int8:
            coded = add("QuantizeLinear", [now, step, middle], f"coded{i}")
            now = add("DequantizeLinear", [coded, step, middle], f"given{i}")
            weight = add("DequantizeLinear", [constant(f"levels{i}", levels), fine, zero], f"weight{i}")
        else:
            weight = constant(f"weight{i}", levels.astype(np.float32) * scale)
        now = add("MatMul", [now, weight], f"product{i}")
    head = wire_field(1, 10) + wire_field(8, wire_field(1, "") + wire_field(2, 20))
    used = constants if int8 else constants[4:]
    return Piece("products", head, nodes, used, ["image"], [now]).model(
        {"image": np.zeros((1, 3, SIDE, SIDE), np.float32)}
    )
