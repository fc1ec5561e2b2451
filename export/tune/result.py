"""What ``--tune`` found: table, JSON, Markdown, and a self-contained page with the Pareto plot."""

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.files import write_json, write_text
from tinymim_export.report.page import Section, cards, commands, environment_table, files_table, table, write_report
from tinymim_export.report.page import verdict as sentence
from tinymim_export.report.plots import ScatterPoint, scatter
from tinymim_export.tables import markdown_table, text_table
from tinymim_export.tune.verdict import BASELINE, PROMOTED, Budget, Candidate, change, signed

UNEVEN = 1.15  # times the original may take in one round what it takes in another


@dataclass
class TuneResult:
    """Every candidate with its verdict, and the winner; prints, writes JSON and Markdown.

    Attributes:
        onnx: Where the winner was written; None where nothing was promoted.
        folder: Of all candidates and results.
        winner: The chosen candidate.
        candidates: The first is the FP32 original on the first runtime, which the others are compared with.
        left_out: (what, why) of candidates that are not possible here.
        why: Why the winner won.
        onnx_sha256: Of the file at ``onnx``: the winner's graph with its card.
    """

    onnx: str | None
    folder: str
    winner: Candidate | None
    candidates: list[Candidate]
    left_out: list[tuple[str, str]]
    budget: Budget
    settings: dict[str, Any]
    environment: dict[str, Any]
    why: str = ""
    onnx_sha256: str = ""
    seconds: float = 0.0
    next: list[str] = field(default_factory=list)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``. The written winner is listed once more under its own sha256."""
        value = {"kind": "tinymim.tune"} | asdict(self)
        if self.winner is not None and self.onnx is not None:
            written = {"name": Path(self.onnx).name, "file": Path(self.onnx).name, "sha256": self.onnx_sha256}
            value["candidates"].append(asdict(self.winner) | written | {"copy_of": self.winner.sha256})
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def write(self) -> None:
        """``tune.json``, ``tune.md`` and ``report.html`` in the folder."""
        folder = Path(self.folder)
        self.next = self._next()
        self.to_json(folder / "tune.json")
        write_text(folder / "tune.md", self.to_markdown())
        write_tune_report(self, folder / "report.html")

    def ranked(self) -> list[Candidate]:
        """The original, then the others, fastest first."""
        return self.candidates[:1] + sorted(self.candidates[1:], key=lambda c: -c.speed_up[0])

    def table(self) -> list[list[str]]:
        """Heading and one line per candidate."""
        lines = [
            [
                "file",
                "runtime",
                "verdict",
                "p50 ms in its round (95 %)",
                "times as fast",
                "mIoU %",
                "change (95 %)",
                "MiB",
            ]
        ]
        for c in self.ranked():
            base = c.verdict == BASELINE
            ratio = "1" if base else f"{c.speed_up[0]:.2f} ({c.speed_up[1]:.2f} to {c.speed_up[2]:.2f})"
            times = f"{c.p50_ms:.1f} ({c.p50_interval[0]:.1f} to {c.p50_interval[1]:.1f})"
            word = "WINNER" if c is self.winner else c.verdict
            score = [f"{100 * c.mIoU:.2f}", "" if base else change(c)]
            lines.append([c.name, c.engine, word, times, ratio, *score, f"{c.file_mib:.1f}"])
        return lines

    def reasons(self) -> list[str]:
        """One line per candidate: why."""
        return [
            f"{c.verdict} {c.name} on {c.engine}: {'; '.join([*c.reasons, *(f'note: {text}' for text in c.remarks)])}"
            for c in self.ranked()
            if c.verdict != BASELINE
        ]

    def doubts(self) -> list[str]:
        """What makes the figures of different rounds hard to compare."""
        paces = [c.original_ms for c in self.candidates]
        if max(paces) <= UNEVEN * min(paces):
            return []
        return [
            f"the machine's pace changed: the original took {min(paces):.1f} ms in one round and {max(paces):.1f} in "
            "another; compare files by 'times as fast' (round by round), not by ms"
        ]

    def conclusion(self) -> str:
        """One sentence."""
        if self.winner is None:
            return f"nothing is promoted: no candidate keeps the budget ({self.budget})"
        return f"winner: {self.winner.name} on {self.winner.engine} ({self.why})"

    def to_markdown(self) -> str:
        """Table, reasons and what the figures hold for."""
        lines = [f"Budget: {self.budget}. {self.conclusion()}.", "", markdown_table(self.table())]
        lines += [f"- {text}" for text in self.reasons()]
        lines += [f"- left out: {what}: {why}" for what, why in self.left_out]
        lines += [f"- note: {text}" for text in self.doubts()]
        return "\n".join([*lines, "", self._measured()]) + "\n"

    def print(self) -> None:
        """The same for a terminal."""
        print(text_table(self.table()))
        for text in self.reasons():
            print(text)
        for text in self.doubts():
            print(f"note: {text}")
        print(self.conclusion())
        if self.onnx:
            print(f"wrote {self.onnx} (sha256 {self.onnx_sha256[:12]}); everything measured: {self.folder}")

    def _measured(self) -> str:
        about, first = self.environment, self.candidates[0]
        return (
            f"Measured on {about['cpu']}, {first.threads} threads, input {'x'.join(map(str, first.shape))}, in turns "
            "in one process; 'times as fast' is the median over the rounds of the original's time over the file's; "
            f"mIoU of each file itself on {first.images} photos of {first.data} ({first.mode}); 95 % bootstrap "
            "intervals, mIoU paired over photos."
        )

    def _next(self) -> list[str]:
        """Commands to paste."""
        if self.winner is None:
            return []
        how = "".join(
            f" --{option} {value}"
            for option, value, usual in (
                ("runtime", self.winner.runtime, "onnxruntime"),
                ("provider", self.winner.provider, "cpu"),
                ("precision", self.winner.arithmetic, None),
            )
            if value != usual
        )
        fed = "".join(f" --{name} {value}" for name, value in (("mode", self.settings.get("mode")),) if value)
        fed += " --resize-to-file" * bool(self.settings.get("resize_to_file"))
        ignored, zero = self.settings.get("ignore_label"), self.settings.get("reduce_zero_label")
        read = "" if ignored is None else f" --ignore-label {' '.join(map(str, np.atleast_1d(ignored)))}"
        read += {True: " --reduce-zero-label", False: " --no-reduce-zero-label", None: ""}[zero]
        onnx, folder, data = (shlex.quote(str(path)) for path in (self.onnx, self.folder, self.settings["data"]))
        return [
            f"tinymim predict {onnx} photo.jpg --out mask.png --overlay{fed}{how}",
            f"tinymim eval {onnx} --data {data}{read}{fed}{how}",
            f"tinymim report {folder} {onnx} --line --out line.html",
        ]


def write_tune_report(result: TuneResult, path: Path) -> Path:
    """The page: verdict, Pareto plot, every candidate with its reasons, machine."""
    first, winner = result.candidates[0], result.winner
    points = [  # at the original's pace of the first round, whatever the machine did in later ones
        ScatterPoint(
            c.name,
            first.p50_ms / c.speed_up[0],
            100 * c.mIoU,
            (first.p50_ms / c.speed_up[2], first.p50_ms / c.speed_up[1]),
            (100 * c.mIoU_interval[0], 100 * c.mIoU_interval[1]),
            c.engine,
            c is winner,
        )
        for c in result.ranked()
    ]
    headline = [("original", f"{first.p50_ms:.1f} ms", f"mIoU {100 * first.mIoU:.2f} %, {first.engine}", "")]
    if winner is not None:
        headline += [
            ("winner", f"{winner.p50_ms:.1f} ms", f"{winner.name}, {winner.engine}", "good"),
            ("times as fast", f"{winner.speed_up[0]:.2f}", f"{winner.speed_up[1]:.2f} to {winner.speed_up[2]:.2f}", ""),
            ("change of mIoU", f"{signed(-winner.drop)} points", change(winner), ""),
        ]
    head, *rows = result.table()
    why = [
        sentence(f"{c.name} on {c.engine}: {'; '.join([*c.reasons, *c.remarks])}", c.verdict == PROMOTED)
        for c in result.ranked()[1:]
    ]
    slow = [
        (
            c.name,
            c.engine,
            ", ".join(f"{count} {name}" for name, count in c.facts.get("nodes", {}).items()),
            c.facts.get("unfused_pairs", ""),
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in c.facts.get("top_operators", [])),
        )
        for c in result.ranked()
    ]
    features = result.environment.get("cpu_features")
    can = "unknown" if features is None else ", ".join(name for name, has in features.items() if has) or "none"
    promoted = sum(c.verdict == PROMOTED for c in result.candidates)
    steps = [("", text) for text in result.next]
    return write_report(
        path,
        f"Verdict on {result.settings['checkpoint']}",
        f"{len(result.candidates) - 1} candidates, {promoted} promoted. Budget: {result.budget}.",
        Section("Verdict", [sentence(result.conclusion(), winner is not None), cards(headline)]),
        Section(
            "Time against quality",
            [scatter("Pareto plot", points, "p50 ms, paced by the original timed beside it", "mIoU %")],
            "Left and up is better. Whiskers: 95 % bootstrap intervals; those of the mIoU are over photos, the same "
            "for all files, so differences between files are surer than they look.",
        ),
        Section(
            "Candidates", [table(head, rows), *(sentence(text, False) for text in result.doubts())], result._measured()
        ),
        Section("Reasons", why, "Green: promoted."),
        Section(
            "Where the time goes",
            [table(("file", "runtime", "nodes", "unfused Q/DQ pairs", "top operators"), slow, "why")],
            f"This processor has: {can}.",
        ),
        Section("Left out", [table(("what", "why"), result.left_out)] if result.left_out else []),
        Section("Next", [commands(steps)] if steps else []),
        Section("Files", [files_table(path.parent, sorted(path.parent.glob("*.onnx")))]),
        Section("Machine", [environment_table(result.environment)]),
        footer=f"tinymim {result.environment.get('versions', {}).get('tinymim', '')}".strip(),
    )
