"""What a comparison of two models' outputs is: thresholds, rows, the result. numpy only."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import CheckFailed
from tinymim.files import write_json
from tinymim_export.tables import markdown_table

MAX_ERROR = 1e-4  # of the largest absolute reference value
MIN_COSINE = 0.999999
MIN_EQUAL = 0.999  # share of pixels with the same class


@dataclass
class Row:
    """One comparison: an output at one size and batch."""

    name: str
    shape: tuple[int, ...]  # of the input
    source: str  # "random", "photos", "test_step" (the model's own test of a photo), or what the file was tested for
    max_error: float | None = None  # largest absolute difference
    relative_error: float | None = None  # of the largest absolute reference value
    cosine: float | None = None
    equal_pixels: float | None = None  # share, 0 to 1
    equal: int | None = None  # pixels of a whole mask that are equal, and how many there are
    pixels: int | None = None
    passed: bool = False
    remark: str = ""

    def __str__(self) -> str:
        words = [f"-[{'ok' if self.passed else 'x'}] {self.name} {'x'.join(map(str, self.shape))} {self.source}:"]
        if self.max_error is not None:
            words.append(
                f"max error {self.max_error:.1e} (relative {self.relative_error:.1e}), cosine {self.cosine:.7f}"
            )
        if self.equal_pixels is not None:
            words.append(f"{'' if self.max_error is None else ', '}equal pixels {100 * self.equal_pixels:.3f} %")
        return " ".join(words).replace(" ,", ",") + (f" {self.remark}" if self.remark else "")


@dataclass
class ParityResult:
    """All comparisons of one file; prints, writes JSON and Markdown."""

    file: str
    rows: list[Row] = field(default_factory=list)
    graph_sha256: str = ""

    @property
    def passed(self) -> bool:
        """Whether there are comparisons and all of them passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """Worst figures, thresholds and shapes, for the file's metadata."""
        rows = [row for row in self.rows if row.source in ("random", "photos")]
        errors = [row.relative_error for row in rows if row.relative_error is not None]
        equal = [row.equal_pixels for row in rows if row.equal_pixels is not None]
        return {
            "relative_error": max(errors, default=None),
            "cosine": min((row.cosine for row in rows if row.cosine is not None), default=None),
            "equal_pixels": min(equal, default=None),
            "shapes": sorted({row.shape for row in rows}),
            "photos": any(row.source == "photos" for row in rows),
            "test_step": self.test_step(),
            "thresholds": {"relative_error": MAX_ERROR, "cosine": MIN_COSINE, "equal_pixels": MIN_EQUAL},
            "graph_sha256": self.graph_sha256,
        }

    def test_step(self) -> dict[str, Any] | None:
        """How many pixels of a photo's mask the file's whole contract gives as the model's own test does."""
        row = next((row for row in self.rows if row.source == "test_step"), None)
        return (
            None
            if row is None
            else {"equal": row.equal, "pixels": row.pixels, "photo": list(row.shape[2:]), "least": MIN_EQUAL}
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value: dict[str, Any] = {"file": self.file, "passed": self.passed, "summary": self.summary()}
        value["rows"] = [asdict(row) for row in self.rows]
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def to_markdown(self) -> str:
        """A table of the comparisons."""
        lines = [["", "output", "input", "source", "max error", "relative", "cosine", "equal pixels"]]
        for row in self.rows:
            figures = [row.max_error, row.relative_error]
            lines.append(
                [
                    "ok" if row.passed else "FAILED",
                    row.name,
                    "x".join(map(str, row.shape)),
                    row.source,
                    *("" if value is None else f"{value:.1e}" for value in figures),
                    "" if row.cosine is None else f"{row.cosine:.7f}",
                    "" if row.equal_pixels is None else f"{100 * row.equal_pixels:.3f} %",
                ]
            )
        return markdown_table(lines)

    def print(self) -> None:
        """One line per comparison."""
        for row in self.rows:
            print(f"  {row}", flush=True)

    def require(self) -> None:
        """Raise :class:`CheckFailed` unless everything passed."""
        if self.passed:
            return
        failed = [row for row in self.rows if not row.passed]
        raise CheckFailed(
            f"{self.file} does not give what PyTorch gives ({len(failed)} of {len(self.rows)} checks failed)",
            str(failed[0] if failed else "nothing was compared"),
            "do not deploy it; export again, and report the model and this output if that fails too",
        )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two float64 vectors."""
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)


def figures(row: Row, got: np.ndarray, wanted: np.ndarray) -> Row:
    """Fill in the errors of ``got`` against ``wanted`` and decide."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        row.remark = f"gives {got.dtype} {got.shape}, not {wanted.dtype} {wanted.shape}"
        return row
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    largest = float(np.abs(b).max())
    row.max_error = float(np.abs(a - b).max())
    row.relative_error = row.max_error / max(largest, 1e-12)
    row.cosine = cosine(a, b)
    row.passed = bool(row.relative_error <= MAX_ERROR and row.cosine >= MIN_COSINE)  # False for NaN
    if row.name == "logits":
        ids = [x[:, 0] > 0 if x.shape[1] == 1 else x.argmax(axis=1) for x in (got, wanted)]
        row.equal_pixels = float((ids[0] == ids[1]).mean())
        row.passed = row.passed and row.equal_pixels >= MIN_EQUAL
    return row
