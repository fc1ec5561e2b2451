"""``tinymim report``: everything known about a lineage of files on one page, joined by sha256.

numpy, Pillow and onnxruntime only. The page loads nothing from elsewhere; ``lineage.json`` beside it holds the same
facts for machines and can be given to the next report, say on another machine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError
from tinymim.files import write_json
from tinymim_export.report.artifacts import read_paths
from tinymim_export.report.compare import CompareResult, compare_reports
from tinymim_export.report.figures import points
from tinymim_export.report.lineage import Lineage, Row
from tinymim_export.report.lineage_page import letter, write_lineage_page
from tinymim_export.report.photo_rows import photo_rows
from tinymim_export.tables import markdown_table, printable, text_table

__all__ = ["CompareResult", "LineageResult", "build_report", "compare_reports"]


@dataclass
class LineageResult:
    """A joined lineage and its page; prints, writes JSON and Markdown."""

    lineage: Lineage
    report: str

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        if path is not None:
            write_json(path, self.lineage.to_dict())
        return json.dumps(self.lineage.to_dict(), indent=1)

    def table(self) -> list[list[str]]:
        """Heading and one row per file, engine and place of measurement (a letter, see :meth:`places`)."""
        lines = [["file", "role", "sha256", "MiB", "engine", "mIoU %", "photos", "against FP32", "p50 ms", "on"]]
        letters = self.places()
        for row in self.lineage.rows():
            for place in list(row.times) or [""]:
                timed = [f"{row.times[place].p50_ms:.1f}", letters[place]] if place else ["", ""]
                lines.append([*_cells(row), *timed])
        return lines

    def places(self) -> dict[str, str]:
        """Where times were taken -> A, B, ... as on the page."""
        return {place: letter(i) for i, place in enumerate(self.lineage.places())}

    def to_markdown(self) -> str:
        """The table, and what a reader needs to understand it."""
        return markdown_table(self.table()) + "".join(f"\n{text}\n" for text in self._remarks())

    def _remarks(self) -> list[str]:
        absent = sum(not file.given for file in self.lineage.files)
        notes = [f"p50 ms, {letter}: {place}" for place, letter in self.places().items()]
        notes += [f"note: {note}" for note in self.lineage.notes]
        return notes + ([f"note: {absent} file(s) of the lineage were not given"] if absent else [])

    def print(self) -> None:
        """The table for a terminal."""
        print(printable("\n".join([text_table(self.table()), *self._remarks(), f"report: {self.report}"])))


def _cells(row: Row) -> list[str]:
    score = row.score
    lost = "" if score is None or score.loss is None else points(score.loss)
    role = row.file.role if row.file.role != "onnx" else row.file.kind or "onnx"
    return [
        row.file.name,
        role,
        row.file.sha256[:10],
        f"{row.file.mib:.1f}" if row.file.mib else "",
        row.engine or "",
        "" if score is None else f"{100 * score.miou:.2f}",
        "" if score is None else str(score.images or ""),
        lost,
    ]


def build_report(
    paths: str | Path | Sequence[str | Path], out: str | Path, *, data: str | Path | None = None, **reading: Any
) -> LineageResult:
    """Join files and results into one page, and ``lineage.json`` beside it.

    Args:
        paths: Run folders, .onnx, .pth and result files (``--json`` of bench, eval, tinymim-export, ...), an earlier
            lineage.json, or folders searched for these. Results next to a given .onnx that refer to it count, too.
        out: The .html file.
        data: Labelled folder, or any folder of photos: the files are run on it, and the photos on which they differ
            most from their FP32 original are shown.
        reading: ``ignore_label`` and ``reduce_zero_label`` of that folder, where it has no dataset.json.

    Raises:
        ConfigError: no paths, or ``out`` is not an .html file.
        DataError: a path that is missing, damaged or not one of ours.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    out = checked_out(out)
    if not given:
        raise ConfigError("nothing to report on", "no paths were given", "tinymim report runs/ --out report.html")
    lineage = read_paths(given)
    photos, note = photo_rows(lineage, Path(data), **reading) if data is not None else ("", "")
    name = given[0].resolve().name if len(given) == 1 else "Teacher, student, segmentor, files"
    title = f"Report: {name}" if len(given) == 1 else name
    write_lineage_page(lineage, out, title=title, photos=photos, photos_note=note)
    result = LineageResult(lineage, str(out))
    result.to_json(out.parent / "lineage.json")
    return result


def checked_out(out: str | Path) -> Path:
    """The page's path.

    Raises:
        ConfigError: it is a folder or no .html file.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        example = f"e.g. --out {out.with_suffix('.html')}"
        raise ConfigError(f"{out} is not an .html file", "the report is a page", example)
    return out
