"""Two stored results of ``tinymim bench`` side by side: refused unless one machine and one setting made both.

Times of two sessions differ by a few percent for reasons no one controls (placement in memory, clock, neighbours), so
a difference counts only beyond :data:`SESSION_SPREAD`. To be sure, time both files in one ``tinymim bench``.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.records import TimedBench
from tinymim.schema import check, read_json
from tinymim_export.bench.results import JsonResult
from tinymim_export.runtime.engines import packages
from tinymim_export.tables import markdown_table, text_table

SESSION_SPREAD = 0.04  # the same engine measured in two sessions (RF-DETR issue 1024); ours lie within
STAMP = ("cpu", "cores", "platform", "machine", "cpu_features", "gpus")


@dataclass
class ComparedRow:
    """One file on one runtime, before and after."""

    before: str
    after: str
    engine: str
    same_file: bool  # by sha256
    before_ms: float
    after_ms: float
    speed_up: tuple[float, float, float]  # before over after, 95 % interval
    differs: bool


@dataclass
class BenchComparison(JsonResult):
    """Rows both results have; prints, writes JSON and Markdown."""

    kind = "tinymim.compare"

    rows: list[ComparedRow]
    left_out: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def table(self) -> list[list[str]]:
        """Heading and one line per pair."""
        lines = [["file", "runtime", "before ms", "after ms", "times as fast", "verdict"]]
        for row in self.rows:
            name = row.before if row.before == row.after else f"{row.before} -> {row.after}"
            ratio, low, high = row.speed_up
            word = ("faster" if ratio > 1 else "slower") if row.differs else "not distinguishable"
            times = [f"{row.before_ms:.2f}", f"{row.after_ms:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            lines.append([name, row.engine, *times, word + (" (the same file)" if row.same_file else "")])
        return lines

    def notes(self) -> list[str]:
        """What to keep in mind."""
        text = (
            f"two sessions of one machine: differences below {100 * SESSION_SPREAD:.0f} % do not count; to be sure, "
            "time the files in one tinymim bench"
        )
        return [text, *(f"only in one of the two: {name}" for name in self.left_out)]

    def to_markdown(self) -> str:
        """Table and notes."""
        return markdown_table(self.table()) + "".join(f"\n{note}\n" for note in self.notes())

    def print(self) -> None:
        """Table and notes for a terminal."""
        print("\n".join([text_table(self.table()), *(f"note: {note}" for note in self.notes())]))


def compare_benches(before: str | Path, after: str | Path) -> BenchComparison:
    """Compare two JSON results of ``tinymim bench``.

    Rows belong together when file name, runtime and input are the same; two results of one row each always do.

    Raises:
        CheckFailed: they were measured on different machines, runtimes or settings.
        ConfigError: they have no row in common.
        DataError: a file that is not a result of ``tinymim bench``.
    """
    values = [read_bench(path) for path in (before, after)]
    refuse_other_machine(values[0], values[1], str(before), str(after))
    tables = [{_key(row): row for row in value["rows"]} for value in values]
    if len(values[0]["rows"]) == len(values[1]["rows"]) == 1:
        pairs = [(values[0]["rows"][0], values[1]["rows"][0])]
        if pairs[0][0]["shape"] != pairs[0][1]["shape"]:
            shapes = ["x".join(map(str, row["shape"])) for row in pairs[0]]
            raise ConfigError(
                "the two results are of different inputs",
                f"{shapes[0]} against {shapes[1]}",
                "measure both at one --size",
            )
    else:
        pairs = [(row, tables[1][key]) for key, row in tables[0].items() if key in tables[1]]
    if not pairs:
        names = ["; ".join(" ".join(key) for key in table) for table in tables]
        raise ConfigError(
            "the two results have no row in common",
            f"{names[0]} against {names[1]}: file name, runtime and input must be the same",
            "time the files together: tinymim bench A.onnx B.onnx",
        )
    rows = [_compared(*pair) for pair in pairs]
    used = {_key(row) for pair in pairs for row in pair}
    left_out = [" ".join(key) for table in tables for key in table if key not in used]
    return BenchComparison(rows, left_out, values[0]["environment"])


def read_bench(path: str | Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        DataError: missing, damaged, or not a result of ``tinymim bench``.
    """
    fix = "name a file written by tinymim bench --json"
    value = read_json(path, fix=fix)
    if not isinstance(value, dict) or value.get("kind") != "tinymim.bench":
        kind = value.get("kind", "no kind") if isinstance(value, dict) else "a list"
        raise DataError(
            f"{path} is not a result of tinymim bench",
            f"it says {kind!s:.80}",
            "write one: tinymim bench FILE.onnx --json out.json",
        )
    return check(value, TimedBench, str(path), fix=fix)


def refuse_other_machine(
    before: dict[str, Any], after: dict[str, Any], first: str = "the first", second: str = "the second"
) -> None:
    """Raise :class:`CheckFailed` where two results' stamps differ in anything that decides the speed."""
    differing = machine_differences(before["environment"], after["environment"])
    threads = [sorted({row["threads"] for row in value["rows"]}) for value in (before, after)]
    if threads[0] != threads[1]:
        differing.append(f"threads: {threads[0]} against {threads[1]}")
    if differing:
        raise CheckFailed(
            f"{first} and {second} cannot be compared: they were not measured alike",
            "; ".join(differing),
            "measure both files on one machine in one command: tinymim bench A.onnx B.onnx",
        )


def machine_differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between two machine stamps, in words; a package that only one of them has differs, too."""
    out = []
    for key in STAMP:
        if a.get(key) != b.get(key):
            out.append(f"{key}: {_feature_words(a.get(key))} against {_feature_words(b.get(key))}")
    for name in packages():
        have = [stamp.get("versions", {}).get(name, "absent") for stamp in (a, b)]
        if have[0] != have[1]:
            out.append(f"{name}: {have[0]} against {have[1]}")
    return out


def _feature_words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(name for name, has in value.items() if has) or "none"
    return "unknown" if value is None else str(value)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return Path(row["file"]).name, row["engine"], "x".join(map(str, row["shape"]))


def _compared(before: dict[str, Any], after: dict[str, Any]) -> ComparedRow:
    """Ratio of two medians from their intervals (half-widths of logarithms add in squares: Zou and Donner 2008)."""
    a, b = before["p50_ms"], after["p50_ms"]
    (a_low, a_high), (b_low, b_high) = before["p50_interval"], after["p50_interval"]
    low = math.log(a / b) - math.hypot(math.log(a / a_low), math.log(b_high / b))
    high = math.log(a / b) + math.hypot(math.log(a_high / a), math.log(b / b_low))
    speed_up = (a / b, math.exp(low), math.exp(high))
    spread = math.log1p(SESSION_SPREAD)
    return ComparedRow(
        before=Path(before["file"]).name,
        after=Path(after["file"]).name,
        engine=before["engine"],
        same_file=before["sha256"] == after["sha256"],
        before_ms=a,
        after_ms=b,
        speed_up=speed_up,
        differs=not low - spread <= 0 <= high + spread,
    )
