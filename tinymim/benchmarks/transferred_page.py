"""The page of ``tools/what_was_transferred.py``: JSON, Markdown, and pictures (SVG) for light and dark pages.

Pictures are narrow files of their own: side by side where the page is wide, one below the other on a phone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.files import write_json, write_text
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import LETTER, tick_label, ticks
from tinymim_export.tables import markdown as plain
from tinymim_export.tables import markdown_table, printable

WIDTH, LEFT, RIGHT, PLOT, FOOT, LINE = 420, 46, 12, 220, 40, 17  # of a picture, in pixels
STYLE = Html("""<style>
svg {
  --ink: #1c1d20; --soft: #5d6068; --grid: #dcdcd8; --page: #fff; --c0: #2f6fdb; --c1: #d8602a; --c2: #1a8f63;
  --c3: #9155c8; --c4: #b0850f; --c5: #d0467f; --c6: #218ca0; --c7: #7a7f88;
}
@media (prefers-color-scheme: dark) {
  svg {
    --ink: #ecedef; --soft: #a0a4ac; --grid: #3a3d42; --page: #131416; --c0: #6ba0f5; --c1: #f08c58; --c2: #4cc495;
    --c3: #b98ae6; --c4: #e0bd55; --c5: #ee7fab; --c6: #5fc6d8; --c7: #9aa0a9;
  }
}
text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.title { font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); fill: none; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
</style>""")
TEACHER, STUDENTS = 1, (0, 2, 3, 4, 5, 6, 7)  # colours


@dataclass
class Curve:
    """A line of a picture.

    Args:
        name: In the legend.
        points: (x, y).
        colour: 0 to 7.
        dots: Further points of its colour, without a line: single heads.
        dashed: Another stroke, for more lines than colours.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dots: Sequence[tuple[float, float]] = field(default_factory=list)
    dashed: bool = False


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the pictures, ``transferred.json`` and, last, ``transferred.md``; returns the latter."""
    for name, picture in pictures(results).items():
        write_text(folder / name, picture)
    write_json(folder / "transferred.json", results)
    write_text(folder / "transferred.md", markdown(results))
    return folder / "transferred.md"


# pictures ---------------------------------------------------------------------------------------------------------


def pictures(results: Mapping[str, Any]) -> dict[str, Html]:
    """File name -> SVG."""
    teacher, students, target = results["teacher"], results["students"], results["target_block"]
    feature = knn_feature(results)
    out = {}
    if feature:
        shown = [("teacher", teacher, TEACHER), *((name, s, colour(i)) for i, (name, s) in enumerate(students.items()))]
        lines = [
            Curve(name, percent(enumerate(side["knn"][feature], 1)), c, dashed=i > len(STUDENTS))
            for i, (name, side, c) in enumerate(shown)
        ]
        out["knn_blocks.svg"] = chart(f"k-NN top-1 of the {feature}, %", "after block", lines)
    if results["knn_epochs"]:
        lines = [
            Curve(name, percent(results["knn_epochs"][name]), colour(i), dashed=i >= len(STUDENTS))
            for i, name in enumerate(students)
            if name in results["knn_epochs"]
        ]
        out["knn_epochs.svg"] = chart("k-NN top-1 while training, %", "epoch", lines)
    for i, (name, student) in enumerate(students.items()):
        out[f"{slug(name)}_cka.svg"] = heat_map(f"CKA, {name}", student["cka"], target)
        for what, unit in (("distance", "pixels"), ("entropy", "nats")):
            lines = [heads("teacher", teacher[what], TEACHER), heads(name, student[what], colour(i))]
            out[f"{slug(name)}_{what}.svg"] = chart(f"Attention {what}, {unit}", "block", lines)
    return out


def colour(i: int) -> int:
    """Of the i-th student."""
    return STUDENTS[i % len(STUDENTS)]


def percent(points: Any) -> list[tuple[float, float]]:
    """Shares in percent."""
    return [(x, 100 * y) for x, y in points]


def heads(name: str, values_LH: Sequence[Sequence[float]], c: int) -> Curve:
    """The mean over heads as a line, single heads as dots."""
    means = [(block, sum(row) / len(row)) for block, row in enumerate(values_LH, 1)]
    return Curve(name, means, c, [(block, y) for block, row in enumerate(values_LH, 1) for y in row])


def drawing(height: float, title: str, parts: Sequence[Html]) -> Html:
    """An SVG file with its title."""
    head = html(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}" role="img" '
        'aria-label="{}">{}<text class="title" x="4" y="16">{}</text>',
        *(WIDTH, height, WIDTH, height),
        *(title, STYLE, title),
    )
    return html("{}{}</svg>\n", head, join(parts))


def legend(curves: Sequence[Curve]) -> tuple[list[Html], float]:
    """Names with their colours, in as many rows as they need; and where the rows end."""
    out, x, y = [], 4.0, 16.0 + LINE
    for curve in curves:
        wide = 22 + LETTER * len(curve.name)
        if x > 4 and x + wide > WIDTH:
            x, y = 4.0, y + LINE
        dash = "4 3" if curve.dashed else "none"
        out.append(
            html(
                '<path class="line" style="stroke:var(--c{});stroke-dasharray:{}" d="M{:.1f},{}h14"/>'
                '<text x="{:.1f}" y="{}">{}</text>',
                *(curve.colour, dash, x, y - 4, x + 18, y, curve.name),
            )
        )
        x += wide + 12
    return out, y


def chart(title: str, xlabel: str, curves: Sequence[Curve]) -> Html:
    """Lines over whole numbers; the y axis begins at 0."""
    out, top = legend(curves)
    top += 12
    everything = [point for curve in curves for point in (*curve.points, *curve.dots)]
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    most = 1.05 * max(y for _, y in everything) or 1.0
    right = max(right, left + 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / (right - left)
        return LEFT + 6 + across * (WIDTH - LEFT - RIGHT - 12), top + PLOT * (1 - point[1] / most)

    rows = ticks(0, most, 5)
    for y in rows:
        at, text = place((left, y))[1], tick_label(y, rows)
        out.append(
            html(
                '<path class="grid" d="M{},{:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>',
                *(LEFT, at, WIDTH - RIGHT, LEFT - 6, at + 4, text),
            )
        )
    bottom = top + PLOT
    for x in [x for x in ticks(left, right, 12) if x == round(x)]:
        at = place((x, 0))[0]
        out.append(html('<text x="{:.1f}" y="{}" text-anchor="middle">{:.0f}</text>', at, bottom + 17, x))
    out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, bottom + 34, xlabel))
    for curve in curves:
        path = "L".join("{:.1f},{:.1f}".format(*place(point)) for point in curve.points)
        dash = "5 4" if curve.dashed else "none"
        out += [
            html(
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.6" style="fill:var(--c{});fill-opacity:.5"/>',
                *place(point),
                curve.colour,
            )
            for point in curve.dots
        ]
        out.append(
            html('<path class="line" style="stroke:var(--c{});stroke-dasharray:{}" d="M{}"/>', curve.colour, dash, path)
        )
        if len(curve.points) == 1:
            out.append(
                html(
                    '<circle cx="{:.1f}" cy="{:.1f}" r="4" style="fill:var(--c{})"/>',
                    *place(curve.points[0]),
                    curve.colour,
                )
            )
    return drawing(bottom + FOOT, title, out)


def heat_map(title: str, values: Sequence[Sequence[float | None]], target: int) -> Html:
    """Student's blocks upwards, teacher's to the right; the target block is framed. The colour goes from 0 to 1."""
    rows, columns = len(values), len(values[0])
    cell = (WIDTH - LEFT - RIGHT) / columns
    high, top = min(cell, 26.0), 28.0
    bottom, out = top + rows * high, list[Html]()
    for i, row in enumerate(values):
        y = bottom - (i + 1) * high
        out.append(html('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>', LEFT - 6, y + high / 2 + 4, i + 1))
        for j, value in enumerate(row):
            x, strength = LEFT + j * cell, min(max(value or 0.0, 0.0), 1.0)
            out.append(
                html(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
                    'style="fill:var(--c0);fill-opacity:{:.3f}"/>',
                    *(x, y, cell - 1, high - 1, 0.05 + 0.95 * strength),
                )
            )
            if cell >= 24 and value is not None:
                ink = "page" if strength > 0.75 else "ink"
                text = f"{100 * value:.0f}"
                out.append(
                    html(
                        '<text x="{:.1f}" y="{:.1f}" text-anchor="middle" style="fill:var(--{});font-size:11px">'
                        "{}</text>",
                        *(x + cell / 2, y + high / 2 + 4, ink, text),
                    )
                )
    for j in range(0, columns, -(-columns // 16)):
        out.append(
            html('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>', LEFT + (j + 0.5) * cell, bottom + 16, j + 1)
        )
    out.append(
        html(
            '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{:.1f}" style="fill:none;stroke:var(--c1);'
            'stroke-width:2"/>',
            *(LEFT + (target - 1) * cell - 0.5, top, cell, bottom - top),
        )
    )
    words = "teacher's block to the right, student's upwards; x 100"
    out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, bottom + 34, words))
    return drawing(bottom + FOOT, title, out)


# text -------------------------------------------------------------------------------------------------------------


def knn_feature(results: Mapping[str, Any]) -> str | None:
    """What k-NN is shown of: the class token if all models have one, else the mean of the patch tokens."""
    kept = [side["knn"] for side in (results["teacher"], *results["students"].values())]
    return next((name for name in ("class token", "patches") if all(name in knn for knn in kept)), None)


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """Heading and a row for the teacher and each student."""
    target, feature = results["target_block"], knn_feature(results)
    head = ["model", *([f"k-NN top-1, % ({feature}), last trained block", "best block"] if feature else [])]
    head += ["CKA with the target block: last trained block", "best block", "distance, pixels", "entropy, nats"]
    head += ["KL to the teacher, qk, nats", "vv", "worst outlier that INT8 feels"]
    lines = [head]
    for name, side in (("teacher", results["teacher"]), *results["students"].items()):
        of_teacher = side is results["teacher"]
        at = target if of_teacher else side["trained_blocks"]
        line = [f"{name}, block {at}"]
        if feature:
            knn = side["knn"][feature]
            line += [f"{100 * knn[at - 1]:.1f}", best(knn, "{:.1f}", 100)]
        column = [] if of_teacher else [row[target - 1] for row in side["cka"]]
        line += ["", ""] if of_teacher else [shown(column[at - 1], "{:.2f}"), best(column, "{:.2f}")]
        line += [f"{mean(side['distance'][at - 1]):.0f}", f"{mean(side['entropy'][at - 1]):.2f}"]
        kl = side.get("kl") or {}
        line += [f"{mean(kl[name]):.3f}" if name in kl else "" for name in ("qk", "vv")]
        lines.append([*line, "" if of_teacher else worst(side)])
    return lines


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def shown(value: float | None, form: str) -> str:
    """A number; "-" where there is none (all photos gave the same features)."""
    return "-" if value is None else form.format(value)


def best(values: Sequence[float | None], form: str, unit: float = 1) -> str:
    """The largest value, and its block."""
    known = [(value, -block) for block, value in enumerate(values, 1) if value is not None]
    return f"{form.format(unit * max(known)[0])} (block {-max(known)[1]})" if known else "-"


def worst(student: Mapping[str, Any]) -> str:
    """The largest outlier among the inputs of linear layers that were trained."""
    kept = student["outliers"][: student["trained_blocks"]]
    ratio, block, layer = max(
        (seen[layer] if seen[layer] is not None else float("inf"), block, layer)
        for block, seen in enumerate(kept, 1)
        for layer in seen
    )
    return f"{ratio:.0f} times the usual ({layer} of block {block})"


def markdown(results: Mapping[str, Any]) -> str:
    """The page."""
    teacher, students, target = results["teacher"], results["students"], results["target_block"]
    batches, grid = results["batches"], side_of_grid(results)
    photos = (
        f"{sum(batches)} photos ({plain(results['photos']['pattern'])}), central squares of {results['img_size']} "
        f"pixels; the teacher sees them at {results['teacher_size']}, so that both have a grid of {grid} x {grid} "
        "patches"
    )
    parts = [
        "# What was transferred from teacher to student\n",
        f"Teacher: {plain(teacher['from'])}, {teacher['blocks']} blocks, {teacher['width']} wide, target block "
        f"{target}. {photos}.\n",
        markdown_table(summary(results)),
        f"Outliers: the largest input of a linear layer over the usual one; INT8 suffers above "
        f"{results['outlier_limit']:g}. KL: of token relations, at the block of the student that learned relations "
        "(else its last) against the teacher's target block, mean over the teacher's number of heads. Both on at "
        "most 32 photos.\n",
    ]
    probes = ["knn_blocks.svg"] if knn_feature(results) else []
    probes += ["knn_epochs.svg"] if results["knn_epochs"] else []
    if probes:
        parts += ["## k-NN\n", " ".join(f"![k-NN]({name})" for name in probes) + "\n"]
        if labelled := results["labelled"]:
            parts.append(
                f"{labelled['train']['used']} reference and {labelled['val']['used']} query photos of "
                f"{labelled['classes']} classes ({plain(labelled['folder'])}); 20 neighbours, cosine, weighted "
                "(arXiv 1805.01978).\n"
            )
    for name, student in students.items():
        links = [f"![{what}]({slug(name)}_{what}.svg)" for what in ("cka", "distance", "entropy")]
        parts += [f"## {plain(name)}\n", about(student), " ".join(links) + "\n"]
    parts += ["## How it was measured\n", made(results)]
    return "\n".join(parts)


def side_of_grid(results: Mapping[str, Any]) -> int:
    """Patches a side, of teacher and students alike."""
    return results["teacher_size"] // results["teacher"]["patch"]


def about(student: Mapping[str, Any]) -> str:
    """A student in a few lines: its file, its KL by head."""
    lines = [
        f"{plain(student['from'])}: {student['blocks']} blocks, {student['width']} wide, {student['heads']} heads"
        + (f", trained up to block {student['trained_blocks']}" * (student["trained_blocks"] < student["blocks"]))
        + "."
    ]
    if student["kl"] is None:
        lines.append("Its width has no groups for the teacher's number of heads: no KL of relations.")
    for relation, values in (student["kl"] or {}).items():
        lines.append(f"KL of {relation} by head, block {student['kl_block']}: {', '.join(f'{v:.3f}' for v in values)}.")
    return "  \n".join(lines) + "\n"


def made(results: Mapping[str, Any]) -> str:
    """Definitions, command, machine, and the sha256 of every file."""
    machine, sizes = results["environment"], results["batches"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    models = [("teacher", results["teacher"]), *results["students"].items()]
    files = [("file", "sha256"), *((f"{name}: {side['from']}", side["sha256"]) for name, side in models)]
    files += [(f"{name}: metrics.jsonl", sha256) for name, sha256 in results["metrics"].items()]
    lists = {"photos": results["photos"]}
    if results["labelled"]:
        lists |= {"reference photos": results["labelled"]["train"], "query photos": results["labelled"]["val"]}
    files += [(f"{what}: list of {note['files']} names and sizes", note["list_sha256"]) for what, note in lists.items()]
    return "\n".join(
        [
            f"- CKA: linear, unbiased (HSIC_1), accumulated over {len(sizes)} batches of {min(sizes)} to {max(sizes)} "
            "photos (arXiv 2010.15327); features are the outputs of blocks, patch tokens flattened. Where "
            "photos differ in little but their light, random weights come near 1, too: compare with them.",
            "- Attention: among patches, without prefix tokens. Distance: between the centres of query and key, in "
            "pixels of the student's photo, weighted by attention (arXiv 2010.11929). Entropy: log "
            f"{side_of_grid(results) ** 2} at most. Lines: mean over heads; dots: heads.",
            "- k-NN is of a block's output, before the final norm. Random weights: seed 0; their "
            "sha256 is of the tensors.\n",
            f"```\n{printable(results['command'])}\n```\n",
            f"{plain(machine['cpu'])}, {machine['cores']} cores, {machine['platform']}; {versions}.\n",
            markdown_table(files),
        ]
    )
