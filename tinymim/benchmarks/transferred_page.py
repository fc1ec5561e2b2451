"""The page of ``tools/what_was_transferred.py``: JSON, Markdown, and pictures (SVG) for light and dark pages.

Pictures are narrow files of their own: side by side where the page is wide, one below the other on a phone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim.files import write_json, write_text
from tinymim_export.report.block_figures import Curve, chart, heat_map
from tinymim_export.report.markup import Html
from tinymim_export.tables import markdown as plain
from tinymim_export.tables import markdown_table, printable

TEACHER, STUDENTS = 1, (0, 2, 3, 4, 5, 6, 7)  # colours


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
        out[f"{slug(name)}_cka.svg"] = heat_map(
            f"CKA, {name}", student["cka"], "teacher's block to the right, student's upwards; x 100", frame=target
        )
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
