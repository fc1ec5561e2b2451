"""The page of ``tinymim analyse``, from the plain values of its result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinymim_export.report.block_figures import Boxes, Curve, box_plot, chart, heat_map
from tinymim_export.report.markup import Html
from tinymim_export.report.page import Section, charts, commands, hide_paths, table, write_report

COLOURS = {"A": 0, "B": 1}


def write_analysis(values: Mapping[str, Any], path: str | Path, next_line: str = "") -> Path:
    """Write the page of :meth:`tinymim.analysis.comparison.Analysis.to_dict`.

    Args:
        values: See there.
        path: The .html file.
        next_line: The command to type next.
    """
    models = values["models"]
    names = " and ".join(f"{name}: {model['from']}" for name, model in models.items())
    photos = values["photos"]
    return write_report(
        path,
        "What the blocks hold",
        f"{names}; {sum(values['batches'])} photos ({hide_paths(photos['pattern'])}), central squares.",
        Section("Models", [table(*_summary(models))]),
        Section("Outputs of blocks", [charts(*_similarity(values["cka"]), _ranks(models))], _OUTPUTS),
        Section("Attention", [charts(*_attention(models))], _ATTENTION),
        Section("Next", [commands([("", next_line)])] if next_line else []),
        footer=_made(values),
    )


_OUTPUTS = (
    "Similarity: linear CKA, unbiased (HSIC_1), over mini-batches (arXiv 2010.15327), all patch tokens of a photo; 100 "
    "for equal up to rotation and scale, about 0 for independent; compare with random weights. Effective rank: exp of "
    "the entropy of the singular values of all patch tokens (Roy and Vetterli, 2007), at most the width. Stages take "
    "the place of blocks in a hierarchical model."
)
_ATTENTION = (
    "Among patches, without the class token. Distance: between the centres of query and key, weighted by attention, in "
    "pixels of A's photos, from the model's own patch size. Entropy: 0 where a patch attends to one patch, the "
    "logarithm of their number where it attends to all equally. A box for each block: quartiles, median and extremes "
    "of its heads."
)


def _summary(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["model", "blocks", "width", "heads", "patch", "photos", "distance, last block", "entropy", "rank", "sha256"]
    rows = []
    for name, model in models.items():
        width = model["width"] if isinstance(model["width"], int) else ", ".join(map(str, model["width"]))
        cells = [f"{name}: {model['from']}", model["blocks"], width, model["heads"] or "", model["patch"]]
        cells.append(f"{model['size']} px")
        for what, form in (("distance", "{:.0f} px"), ("entropy", "{:.2f} nats")):
            cells.append(form.format(_mean(model[what][-1])) if model[what] else "")
        rows.append([*map(str, cells), f"{model['rank'][-1]:.0f}", model["sha256"][:12]])
    return head, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _similarity(cka: Mapping[str, Sequence[Sequence[float | None]]]) -> list[Html]:
    titles = {
        "A B": ("CKA, A and B", "B's block to the right, A's upwards; x 100"),
        "A": ("CKA, A with itself", "block; x 100"),
        "B": ("CKA, B with itself", "block; x 100"),
    }
    return [heat_map(titles[name][0], cka[name], titles[name][1]) for name in titles if name in cka]


def _attention(models: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    figures = []
    for what, unit in (("distance", "pixels"), ("entropy", "nats")):
        series = [Boxes(name, model[what], COLOURS[name]) for name, model in models.items() if model[what]]
        if series:
            figures.append(box_plot(f"Attention {what}, {unit}", "block", series))
    return figures


def _ranks(models: Mapping[str, Mapping[str, Any]]) -> Html:
    lines = [Curve(name, [*enumerate(model["rank"], 1)], COLOURS[name]) for name, model in models.items()]
    return chart("Effective rank", "block", lines)


def _range(sizes: Sequence[int]) -> str:
    """ "8", or "4 to 8"."""
    return " to ".join(map(str, sorted({min(sizes), max(sizes)})))


def _made(values: Mapping[str, Any]) -> str:
    machine, photos, sizes = values["environment"], values["photos"], values["batches"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"batches of {_range(sizes)} photos; list of {photos['files']} names and sizes: "
        f"sha256 {photos['list_sha256']}. {machine['cpu']}, {machine['cores']} cores, {machine['platform']}; "
        f"{versions}."
    )
