"""Where the milliseconds go: backbone, pyramid, head and up-sampling cut out of one file and timed next to the whole.

The tensors between the parts are named at export (``tinymim.cost`` lists them): cutting needs neither torch nor onnx.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.bench.graph_parts import cut
from tinymim_export.bench.timing import interleave
from tinymim_export.runtime.engines import random_input
from tinymim_export.runtime.metadata import read_metadata
from tinymim_export.runtime.sessions import IMAGES, open_session, runner
from tinymim_export.tables import billions, markdown_table, millions, text_table

TOLERANCE = 0.15  # largest relative difference between the sum of the parts and the whole
WORTH = 0.1  # smallest share of the time that a proposal must save
LIGHT = {192: "upernet_tinymim_t_light", 384: "upernet_tinymim_s_light", 768: "upernet_tinymim_b_light"}


@dataclass
class SplitRow:
    """One part."""

    part: str
    params: int
    macs: int  # multiply-adds for one image at the exported size
    ms: float  # median
    share: float  # of the sum of the parts' times, 0 to 1


@dataclass
class SplitResult:
    """The parts of one file."""

    file: str
    shape: tuple[int, ...]
    cost_size: tuple[int, int]  # the multiply-adds hold for this size
    rows: list[SplitRow]
    whole_ms: float
    ratio: float  # sum of the parts divided by the whole
    remarks: list[str]

    def table(self) -> list[list[str]]:
        """Heading and one line per part."""
        at = "x".join(map(str, self.cost_size))
        lines = [["part", "parameters", f"multiply-adds at {at}", "p50 ms", "share of time"]]
        for row in self.rows:
            share = f"{100 * row.share:.0f} %"
            lines.append([row.part, millions(row.params), billions(row.macs), f"{row.ms:.2f}", share])
        total = sum(row.params for row in self.rows), sum(row.macs for row in self.rows)
        summed = f"sum / whole = {self.ratio:.2f}"
        return [*lines, ["whole", millions(total[0]), billions(total[1]), f"{self.whole_ms:.2f}", summed]]

    def to_markdown(self) -> str:
        """Table and remarks."""
        title = f"`{Path(self.file).name}` by part, input {'x'.join(map(str, self.shape))}:\n\n"
        return title + markdown_table(self.table()) + "".join(f"\n{remark}\n" for remark in self.remarks)

    def print(self) -> None:
        """Table and remarks for a terminal."""
        print(f"\n{Path(self.file).name} by part:\n{text_table(self.table())}")
        for remark in self.remarks:
            print(remark)


def split_file(
    path: Path, *, provider: str, threads: int, shape: tuple[int, ...], runs: int | None, seconds: float
) -> SplitResult:
    """Cut a file at its named tensors and time every part next to the whole.

    Raises:
        ConfigError: the file names no parts.
    """
    whole = open_session(path, provider, threads)
    cost = read_metadata(whole).get("cost") or {}
    if not cost.get("parts"):
        raise ConfigError(
            f"{path.name} names no parts", "only files of tinymim-export do", "export it again, or leave --split out"
        )
    given = whole.get_inputs()[0]
    known = {given.name: random_input(shape, IMAGES[given.type], 0)}
    runners, parts = [runner(whole, known, provider)], []
    tensors = {part: about["tensors"] for part, about in cost["parts"].items()}
    for part, piece in cut(path.read_bytes(), tensors).items():
        session = open_session(piece.model(known), provider, threads)
        inputs = {name: known[name] for name in piece.inputs}
        known |= dict(zip(piece.outputs, session.run(piece.outputs, inputs), strict=True))
        runners.append(runner(session, inputs, provider))
        parts.append(part)
    best: tuple[float, list[float]] = (np.inf, [])
    for _ in range(3):  # a busy machine can spoil one round
        medians = [float(np.median(ms)) for ms in interleave(runners, runs=runs, seconds=seconds / len(runners))]
        off = abs(sum(medians[1:]) / medians[0] - 1)
        best = min(best, (off, medians))
        if off <= TOLERANCE:
            break
    medians = best[1]
    ms = dict(zip(parts, medians[1:], strict=True))
    rows = [
        SplitRow(part, about["params"], about["macs"], ms.get(part, 0.0), ms.get(part, 0.0) / sum(medians[1:]))
        for part, about in cost["parts"].items()
    ]
    ratio = sum(medians[1:]) / medians[0]
    return SplitResult(str(path), shape, tuple(cost["size"]), rows, medians[0], ratio, remarks(cost, rows, ratio))


def remarks(cost: dict[str, Any], rows: Sequence[SplitRow], ratio: float) -> list[str]:
    """Plain sentences: what dominates, what to change and what that would save, and whether the figures are reliable.

    Savings are estimates: a part's measured time, scaled by the multiply-adds it would have.
    """
    out = []
    if abs(ratio - 1) > TOLERANCE:
        out.append(
            f"warning: the parts add up to {100 * ratio:.0f} % of the whole (more than {100 * TOLERANCE:.0f} % off): "
            "the machine was busy, or the parts are too short to time apart; try again with --seconds 20"
        )
    by_part, whole = {row.part: row for row in rows}, sum(row.ms for row in rows)
    if unread := cost.get("unread"):
        out.append(
            f"the head does not read {', '.join(unread)} of the pyramid; the file does not compute them; training does "
            "unless backbone.out_indices names the one block that is read"
        )
    if "head" not in by_part:
        return out
    macs = max(sum(row.macs for row in rows), 1)
    largest = max(rows, key=lambda row: row.ms)
    out.append(
        f"the {largest.part} is {100 * largest.share:.0f} % of the time and {100 * largest.macs / macs:.0f} % of the "
        "multiply-adds"
    )
    proposals = [(options, left) for options, left in _narrower(cost, by_part, whole) if left <= (1 - WORTH) * whole]
    for options, left in proposals:
        name = LIGHT.get(cost.get("width") or 0)
        known = f" ({name})" if name and options.startswith(f"model.decode_head.channels={cost['width']} ") else ""
        out.append(f"train with {options}{known}: about {left:.1f} ms in place of {whole:.1f} ms")
    up = by_part.get("upsampling")
    if up is not None and up.share > WORTH:
        out.append(
            f"the up-sampling to full size takes {up.ms:.1f} ms: a mask that is decided before it saves most of that "
            "and changes some pixels on edges (tinymim-export --tune says how many)"
        )
    if not proposals:
        rest = 100 * (1 - by_part["backbone"].share)
        out.append(
            f"head and pyramid are light: without both it would still take {100 - rest:.0f} % of the time. Next: lower "
            f"precision and better graphs (tinymim-export --tune), a smaller input (three quarters of each side: about "
            f"{whole * 9 / 16:.1f} ms), a smaller backbone"
        )
    return out


def _narrower(cost: dict[str, Any], rows: dict[str, SplitRow], whole: float) -> list[tuple[str, float]]:
    """(training options, estimated milliseconds of the whole) of every narrower head or pyramid listed in the file."""
    found = []
    for other in cost.get("narrower", []):
        saved = sum(
            rows[part].ms * (1 - macs / max(rows[part].macs, 1)) for part, macs in other["macs"].items() if part in rows
        )
        found.append((other["options"], whole - saved))
    return found
