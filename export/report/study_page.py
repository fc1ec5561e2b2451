"""The table of a study as Markdown, plots and a page, from the plain values of table.json."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.files import write_json, write_text
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.page import Section, commands, table, write_report
from tinymim_export.report.plots import tick_label, ticks
from tinymim_export.tables import markdown as plain
from tinymim_export.tables import markdown_table, printable

WIDTH, ROW, HEAD, FOOT = 820, 28, 26, 30  # of a plot, in SVG units
LEFT, MIDDLE, RIGHT = 232, (476, 516), 806  # ends of the paper's panel and of ours
COLOURS = Html("""<style>
svg { --ink: #1c1d20; --soft: #5d6068; --grid: #dcdcd8; --c0: #2f6fdb; --c1: #d8602a; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #ecedef; --soft: #a0a4ac; --grid: #3a3d42; --c0: #6ba0f5; --c1: #f08c58; }
}
text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--grid); fill: none; }
</style>""")
VERDICTS = ("reproduced", "reversed", "within noise")


def write_study(values: Mapping[str, Any], folder: Path, command: str) -> list[Path]:
    """Write table.json, table.md, one plot per score and report.html.

    Args:
        values: Those of :func:`tinymim.study.table.study_table`.
        folder: Of the study.
        command: What repeats it.

    Returns:
        The files.
    """
    values = {**values, "command": command}
    write_json(folder / "table.json", values)
    write_text(folder / "table.md", markdown(values))
    plots = [folder / f"{score}.svg" for score in values["scores"]]
    for score, path in zip(values["scores"], plots, strict=True):
        write_text(path, dots(values, score, alone=True))
    return [folder / "table.json", folder / "table.md", *plots, _page(values, folder / "report.html")]


def markdown(values: Mapping[str, Any]) -> str:
    """The whole page for the docs."""
    parts = [f"# {plain(values['title'])}\n", *(f"{plain(lead)}\n" for lead in [_lead(values)] if lead)]
    for score in values["scores"]:
        parts += [f"## {_heading(score)}\n", markdown_table(_rows(values, score)), f"![{score}]({score}.svg)\n"]
        if pairs := _order(values, score):
            parts += [
                "The paper's order, neighbour by neighbour:\n",
                markdown_table(pairs),
                f"{_count(values, score)}\n",
            ]
    parts += [f"{_rule(values)}\n"] if values["pairs"] else []
    parts += [
        "## How it was made\n",
        f"```\n{' '.join(printable(values['command']).split())}\n```\n",
        "\n".join(map(plain, _made(values).split("\n"))),
    ]
    files = markdown_table([("file", "sha256"), *values["files"].items()])
    parts += ["<details><summary>Result files (sha256)</summary>\n", files, "</details>\n"]
    return "\n".join(parts)


@dataclass(frozen=True)
class Panel:
    """A strip of a plot with a scale of its own."""

    left: float
    right: float
    numbers: Sequence[float]

    @property
    def span(self) -> tuple[float, float]:
        """The values at its ends."""
        low, high = (min(self.numbers), max(self.numbers)) if self.numbers else (0.0, 1.0)
        pad = 0.08 * (high - low) or 0.5
        return low - pad, high + pad

    def x(self, value: float) -> float:
        """Where a value is."""
        low, high = self.span
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def axis(self, head: str, bottom: float) -> list[Html]:
        """Heading, lines and their numbers."""
        out = [html('<text x="{}" y="14">{}</text>', self.left, head)]
        places = ticks(*self.span, 6) if self.numbers else []
        for value in places:
            out.append(html('<path class="grid" d="M{},{}V{}"/>', self.x(value), HEAD - 4, bottom))
            out.append(
                html(
                    '<text x="{}" y="{}" text-anchor="middle">{}</text>',
                    self.x(value),
                    bottom + 18,
                    tick_label(value, places),
                )
            )
        return out


def dots(values: Mapping[str, Any], score: str, *, alone: bool = False) -> Html:
    """An SVG: one row per cell; the paper's number on the left, ours on the right with each seed, mean and deviation.

    The two panels have scales of their own: what can be compared is the order and the distances, not the level.

    Args:
        values: Those of table.json.
        score: One of its scores.
        alone: For a file of its own: with colours and size; else the page's style sheet gives them.
    """
    rows = values["rows"]
    unit = 100 if is_percent(score) else 1
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for i, row in enumerate(rows):
        if row["group"] and (i == 0 or rows[i - 1]["group"] != row["group"]):
            lines.append((row["group"], None))
        lines.append((row["cell"], row))
    bottom = HEAD + ROW * len(lines)
    height = bottom + FOOT
    of = [row["scores"][score] for row in rows]
    seen: list[list[Any]] = [[s["paper"] for s in of if s["paper"] is not None], []]
    for s in of:
        seen[1] += [unit * v for v in s["values"].values()]
        seen[1] += [unit * (s["mean"] + sign * s["sd"]) for sign in (-1, 1) if s["sd"] is not None]
    size = html(' xmlns="http://www.w3.org/2000/svg" width="{}" height="{}"', WIDTH, height) if alone else ""
    out = [html('<svg class="scatter" viewBox="0 0 {} {}"{} role="img" aria-label="{}">', WIDTH, height, size, score)]
    out += [COLOURS] if alone else []
    paper = Panel(LEFT, MIDDLE[0], seen[0])
    here = Panel(MIDDLE[1] if seen[0] else LEFT, RIGHT, seen[1])
    out += [*(paper.axis("in the paper", bottom) if seen[0] else []), *here.axis("here", bottom)]
    for i, (name, row) in enumerate(lines):
        y = HEAD + ROW * (i + 0.5)
        if row is None:
            out.append(html('<text x="0" y="{}" style="font-weight:650">{}</text>', y + 5, name))
            continue
        out.append(html('<path class="grid" d="M0,{}H{}"/>', y + ROW / 2, WIDTH))
        fit = html(' textLength="{}" lengthAdjust="spacingAndGlyphs"', LEFT - 16) if len(name) > 33 else ""
        out.append(html('<text x="0" y="{}" style="fill:var(--ink)"{}>{}</text>', y + 4, fit, name))
        out += _marks(row["scores"][score], paper, here, y, unit, bool(row["failed"]))
    return html("{}</svg>", join(out))


def _marks(s: Mapping[str, Any], paper: Panel, here: Panel, y: float, unit: float, failed: bool) -> list[Html]:
    """The dots of one row."""
    out = []
    if s["paper"] is not None:
        out.append(
            html(
                '<circle cx="{}" cy="{}" r="5" style="fill:var(--c1)"><title>{}</title></circle>',
                paper.x(s["paper"]),
                y,
                s["paper"],
            )
        )
    if s["mean"] is None:
        return [*out, html('<text x="{}" y="{}">{}</text>', here.left, y + 4, "failed" if failed else "not run")]
    x = here.x(unit * s["mean"])
    if s["sd"] is not None:
        ends = [here.x(unit * (s["mean"] + sign * s["sd"])) for sign in (-1, 1)]
        out.append(html('<path d="M{},{}H{}" style="stroke:var(--c0);stroke-width:2"/>', ends[0], y, ends[1]))
    out.append(html('<path d="M{},{}V{}" style="stroke:var(--c0);stroke-width:2.4"/>', x, y - 9, y + 9))
    for seed, value in s["values"].items():
        out.append(
            html(
                '<circle cx="{}" cy="{}" r="4" style="fill:var(--c0);fill-opacity:.45">'
                "<title>seed {}: {:.4g}</title></circle>",
                here.x(unit * value),
                y,
                seed,
                unit * value,
            )
        )
    return out


def is_percent(score: str) -> bool:
    """Whether a score (a fraction) is shown in percent."""
    return bool(re.search(r"(?i)top\d|iou|acc", score.rpartition(".")[2]))


def _shown(score: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" if is_percent(score) else f"{value:.4g}"


def _heading(score: str) -> str:
    return f"{score}, percent" if is_percent(score) else score


def _lead(values: Mapping[str, Any]) -> str:
    """Where the paper's column is from, in a sentence or two."""
    paper = values["paper"]
    source = f"The paper's numbers: TinyMIM (arXiv 2301.01296), table {paper['table']}" if "table" in paper else ""
    words = [", ".join(filter(None, [source, paper.get("metric")])), paper.get("note", "")]
    return " ".join(f"{word.rstrip('.')}." for word in words if word)


def _rows(values: Mapping[str, Any], score: str) -> list[list[str]]:
    """Heading and rows: cell, the paper's number, ours with its deviation, each seed, how many, how long."""
    grouped = any(row["group"] for row in values["rows"])
    known = any(row["scores"][score]["paper"] is not None for row in values["rows"])
    columns = [
        "cell",
        *["paper"] * known,
        "mean \u00b1 sd",
        *(f"seed {seed}" for seed in values["seeds"]),
        "n",
        "minutes",
    ]
    lines = [["group"] * grouped + columns]
    for row in values["rows"]:
        s = row["scores"][score]
        mean = _shown(score, s["mean"]) or "not run"
        if s["sd"] is not None:
            mean += f" \u00b1 {_shown(score, s['sd'])}"
        seeds = [
            "failed" if seed in row["failed"] else _shown(score, s["values"].get(str(seed))) for seed in values["seeds"]
        ]
        minutes = f"{sum(row['seconds'].values()) / 60:.1f}" if row["n"] else ""
        paper = ["" if s["paper"] is None else f"{s['paper']:g}"] * known
        lines.append([row["group"]] * grouped + [row["cell"], *paper, mean, *seeds, str(row["n"]), minutes])
    return lines


def _order(values: Mapping[str, Any], score: str) -> list[list[str]]:
    """Heading and rows of the neighbours in the paper's order; empty where it has none."""
    unit = 100 if is_percent(score) else 1
    lines = []
    for pair in values["pairs"]:
        if pair["score"] == score and pair["neighbours"]:
            known = pair["t"] is not None
            lines.append(
                [
                    f"{pair['better']} > {pair['worse']}" + (f" ({pair['group']})" if pair["group"] else ""),
                    f"+{pair['paper']:g}",
                    "" if pair["difference"] is None else f"{unit * pair['difference']:+.2f}",
                    "" if pair["standard_error"] is None else f"{unit * pair['standard_error']:.2f}",
                    f"{pair['t']:.2f} ({pair['df']:.1f}, {pair['test']})" if known else "",
                    f"{pair['p']:.3f}" if known else "",
                    f"{pair['p_holm']:.3f}" if known else "",
                    pair["verdict"],
                ]
            )
    head = ["the paper has", "by", "here by", "standard error", "t (df)", "p", "p, Holm", "verdict"]
    return [head, *lines] if lines else []


def _count(values: Mapping[str, Any], score: str) -> str:
    """All pairs in one sentence."""
    verdicts = [pair["verdict"] for pair in values["pairs"] if pair["score"] == score]
    others = len(verdicts) - sum(verdicts.count(v) for v in VERDICTS)
    counts = ", ".join(
        [*(f"{verdicts.count(v)} {v}" for v in VERDICTS), *([f"{others} without a statement"] if others else [])]
    )
    held = [
        pair["verdict"]
        for pair in values["pairs"]
        if pair["score"] == score and pair["p_holm"] is not None and pair["p_holm"] < values["level"]
    ]
    after = ", ".join(f"{held.count(v)} {v}" for v in VERDICTS[:2])
    return (
        f"Of all {len(verdicts)} pairs of cells that the paper puts in order: {counts}; "
        f"after Holm's correction for their number: {after}."
    )


def _rule(values: Mapping[str, Any]) -> str:
    """How the verdicts are reached."""
    return (
        "The rule: t is the difference of the means over its standard error; reproduced or reversed where the "
        f"two-sided p of Student's t is below {values['level']:g}, else within noise. Paired by seed where both cells "
        "have the same seeds, else Welch's test; sd is the sample's (n - 1). Verdicts are of one pair at a time, "
        "Holm's p is corrected for the number of pairs. Cells of one number in the paper have no order. Empty cells "
        "were not run."
    )


def _common(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage -> options that all cells that were run share."""
    common: dict[str, dict[str, Any]] = {}
    for settings in filter(None, values["settings"].values()):
        for stage, options in settings.items():
            flat = _flat(options)
            kept = common.get(stage, flat)
            common[stage] = {key: value for key, value in kept.items() if key in flat and flat[key] == value}
    return common


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in one level, without what they come down to ("recipe_lines": results before 2026-12)."""
    inner = options.get("cfg_options", {})
    return {k: v for k, v in options.items() if k not in ("cfg_options", "resolved", "recipe_lines", "seed")} | inner


def _made(values: Mapping[str, Any]) -> str:
    """Data, settings and machines as a list."""
    lines = [
        f"- {word}: {item['folder']}, {item['files']} files, list sha256 {item['list_sha256']}"
        for word, item in values["data"].items()
    ]
    shared = {stage: spent for row in values["rows"] for stage, spent in row["shared_seconds"].items()}
    apart = ", ".join(f"{stage} {spent / 60:.1f}" for stage, spent in shared.items())
    lines.append("- minutes: of the stages that follow the seed" + (f"; run once for all: {apart}" if apart else ""))
    common = _common(values)
    for stage, options in common.items():
        lines.append(f"- {stage}: {_words(options)}")
    for cell, settings in values["settings"].items():
        own = {
            stage: {k: v for k, v in _flat(options).items() if k not in common[stage]}
            for stage, options in (settings or {}).items()
        }
        changes = "; ".join(f"{stage} {_words(options)}" for stage, options in own.items() if options)
        if changes:
            lines.append(f"- only {cell}: {changes}")
    for stage, files in values["apart"].items():
        hashes = ", ".join(files)
        lines.append(f"- trained apart: {len(files)} files of {stage}, sha256 {hashes}; its cells are not compared")
    for machine in values["machines"]:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        place = ", ".join(filter(None, [machine["cpu"], f"{machine['cores']} cores", machine.get("gpu")]))
        lines.append(f"- machine: {place}, {machine['threads']} threads per stage, {machine['platform']}; {versions}")
    return "\n".join(lines) + "\n"


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()
    )


def _page(values: Mapping[str, Any], path: Path) -> Path:
    """report.html."""
    sections = []
    for score in values["scores"]:
        head, *rows = _rows(values, score)
        has_paper = any(row["scores"][score]["paper"] is not None for row in values["rows"])
        legend = (
            "Orange: the paper; scales differ. " * has_paper + "Blue dots: seeds; bar and line: mean and deviation."
        )
        figure = html('<figure style="margin-bottom:14px"><div class="wide">{}</div></figure>', dots(values, score))
        sections.append(Section(_heading(score), [figure, table(head, rows)], legend))
        if pairs := _order(values, score):
            order = table(pairs[0], pairs[1:], "why")
            sections.append(Section(f"The paper's order: {score}", [order], _count(values, score)))
    rule = html('<p class="note">{}</p>', _rule(values)) if values["pairs"] else ""
    lines = [line.removeprefix("- ") for line in _made(values).splitlines()]
    listed = html('<ul class="note">{}</ul>', join(html("<li>{}</li>", line) for line in lines))
    made = [rule, commands([("", values["command"])]), listed]
    files = [table(("file", "sha256"), [(name, html("<code>{}</code>", sha)) for name, sha in values["files"].items()])]
    return write_report(
        path,
        values["title"],
        _lead(values),
        *sections,
        Section("How it was made", made),
        Section("Result files", files),
    )
