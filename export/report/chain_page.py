"""The report of a chain of distillations: one page from chain.json and the hops' run folders. Standard library only."""

import math
from pathlib import Path
from urllib.parse import quote

from tinymim.errors import DataError
from tinymim.records import Chain
from tinymim.schema import read_json
from tinymim_export.report.markup import html
from tinymim_export.report.page import (
    Section,
    SegmentLine,
    charts,
    commands,
    here,
    read_metrics,
    run_report,
    segment_any,
    table,
    where_to_run,
    write_report,
)
from tinymim_export.report.plots import Series, chart, number


def chain_report(folder: str | Path, *, segment: SegmentLine = segment_any) -> Path:
    """Write ``report.html`` of a chain, and the report of every hop.

    Args:
        folder: Folder with ``chain.json``.
        segment: See :func:`~tinymim_export.report.page.run_report`.

    Raises:
        DataError: it holds no chain.
    """
    folder = Path(folder)
    if not (folder / "chain.json").is_file():
        raise DataError(f"no chain in {folder}", "chain.json is missing", "tinymim distill --chain ... writes it")
    chain = read_json(folder / "chain.json", Chain)
    rows, curves = [], []
    for i, hop in enumerate(chain["hops"], 1):
        metrics = read_metrics(folder / hop["run"] / "metrics.jsonl")
        run_report(folder / hop["run"], segment=segment)
        losses = metrics.get("loss") or [(0.0, math.nan)]
        curves.append(Series(f"{i} {hop['student'].removeprefix('tinymim_vit_')}", losses))
        grouping = (
            "no relations"
            if hop["relations"] is None
            else (f"block {hop['relations'][0]}, {hop['relations'][1]} heads")
        )
        teacher = hop["teacher"] if i == 1 else chain["hops"][i - 2]["run"]
        rows.append(
            [
                html('<a href="./{}/report.html">{}</a>', quote(hop["run"]), hop["run"]),
                Path(teacher).name,
                grouping,
                f"{hop['steps']:,}",
                number(losses[0][1]),
                number(losses[-1][1]),
                f"{hop['seconds'] / 60:.1f}",
            ]
        )
    head = ["hop", "teacher", "relations learned at", "steps", "first loss", "last loss", "minutes"]
    models = [Path(hop["teacher"]).name for hop in chain["hops"][:1]]  # a report may travel, a home folder should not
    models += [hop["student"].removeprefix("tinymim_vit_") for hop in chain["hops"]]
    arrow = " \u2192 "
    end = f"{chain['hops'][-1]['run'] if chain['hops'] else '.'}/student.pth"
    last = f"{here(folder, folder)}/{end}"
    return write_report(
        folder / "report.html",
        folder.name,
        f"Chain of {len(chain['hops'])} distillations: {arrow.join(models)}.",
        Section(
            "Hops",
            [table(head, rows)],
            "Relations keep the head grouping of the first teacher: a student is read in the one it learned.",
        ),
        Section("Losses", [charts(chart("loss of each hop", curves))] if curves else []),
        Section(
            "Next",
            [
                commands(
                    [
                        (
                            "Fine-tune the last student",
                            f"tinymim finetune --student {last} --data TRAIN --val-data VAL",
                        ),
                        ("Train a segmentor on it", segment(folder / end, last)),
                    ]
                )
            ],
            where_to_run(folder),
        ),
    )
