"""The page of a search by ``tinymim contract``: what was chosen, and every candidate's score against its cost."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim_export.report.markup import Html
from tinymim_export.report.page import Section, commands, environment_table, table, write_report
from tinymim_export.report.plots import ScatterPoint, number, scatter
from tinymim_export.tables import billions, millions

AXES = (
    ("params", 1e6, "million parameters", "smaller"),
    ("macs", 1e9, "billion multiply-adds", "smaller"),
    ("latency_ms", 1.0, "ms", "faster"),
)


def write_contract(
    folder: Path,
    score: str,
    limits: object,
    chosen: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    next_lines: Iterable[tuple[str, str]],
    machine: dict[str, Any],
    counted: str = "Without a classifier, as tinymim-export counts the file.",
    factors: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html`` of a search.

    Args:
        folder: Of the search.
        score: What the score is, in words.
        limits: As text.
        chosen: The start and the best candidate of each step: rows of candidates.jsonl.
        rows: All of them.
        next_lines: (what it does, the command).
        machine: What it ran on.
        counted: What parameters and multiply-adds are of.
        factors: Letter of a change -> what it changes, in words.
    """
    last, first = chosen[-1], chosen[0]
    lead = (
        f"From {millions(first['params'])} parameters and {billions(first['macs'])} multiply-adds to "
        f"{millions(last['params'])} and {billions(last['macs'])} in {len(chosen) - 1} steps; "
        f"{len(rows) - 1} candidates, limits: {limits}."
    )
    return write_report(
        folder / "report.html",
        folder.name,
        lead,
        Section("Score against cost", _figures(score, chosen, rows), _note(score)),
        Section(
            "Chosen in each step", [table(*_steps(score, chosen, rows), kind="numbers")], _legend(rows, factors or {})
        ),
        Section(
            "The model",
            [table(["argument", "start", "found"], _arguments(first["config"], last["config"]))],
            counted,
        ),
        Section("Next", [commands(next_lines)]),
        Section("Machine", [environment_table(machine)]),
    )


def _note(score: str) -> str:
    return (
        f"Score: {score} after a short training, higher is better. Within a step all candidates had the same training; "
        "a later step has had more of it, as its weights are taken from the step before. Ringed: chosen."
    )


def _legend(rows: Sequence[Mapping[str, Any]], factors: Mapping[str, str]) -> str:
    """What the letters of the changes mean."""
    used = {row["factor"] for row in rows}
    said = "; ".join(f"{letter}: {about}" for letter, about in factors.items() if letter in used)
    return f"{said}." if said else ""


def _figures(score: str, chosen: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Html]:
    """One scatter plot for each cost that was measured."""
    figures = []
    best = {(row["step"], row["factor"]) for row in chosen}
    for key, unit, label, less in AXES:
        points = [
            ScatterPoint(
                row["change"],
                row[key] / unit,
                row["score"],
                group=f"step {row['step']}" if row["step"] else "start",
                mark=(row["step"], row["factor"]) in best,
            )
            for row in rows
            if row["score"] is not None and row[key] is not None
        ]
        figures.append(scatter(f"{score} and {label}", points, label, score, less=less))
    return figures


def _steps(
    score: str, chosen: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of chosen candidates."""
    timed = any(row["latency_ms"] is not None for row in chosen)
    head = ["step", "change", "parameters", "multiply-adds", *(["ms"] if timed else []), score, "next best", "minutes"]
    lines = []
    for row in chosen:
        same = [each for each in rows if each["step"] == row["step"]]
        others = sorted((r["score"], r["change"]) for r in same if r["score"] is not None and r is not row)
        line = [str(row["step"]), row["change"], millions(row["params"]), billions(row["macs"])]
        line += [number(row["latency_ms"])] if timed else []
        line += [f"{row['score']:.4f}", f"{others[-1][1]}: {others[-1][0]:.4f}" if others else ""]
        lines.append([*line, f"{sum(each['seconds'] for each in same) / 60:.1f}"])
    return head, lines


def _arguments(start: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(argument, value of the start, value found) of those that differ."""
    return [(key, str(start[key]), str(value)) for key, value in found.items() if start[key] != value]
