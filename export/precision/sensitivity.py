"""Which blocks suffer from INT8, measured in mIoU, equal pixels, and the classes that lose.

One block at a time in INT8, the rest in float; ranges are measured once, and every file is scored. The same figures
decide which blocks stay in float until a budget of mIoU is kept.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import environment, write_json
from tinymim.progress import Progress, say
from tinymim_export.precision.base import find_precision
from tinymim_export.precision.blocks import blocks_of, choose_blocks
from tinymim_export.precision.float_file import FloatFile
from tinymim_export.precision.layerwise import LayerwisePrecision
from tinymim_export.precision.qdq import prepare
from tinymim_export.precision.quantize import QuantizeResult, check_options, quantize
from tinymim_export.runtime.metadata import save_proto, write_metadata
from tinymim_export.runtime.miou import EvalResult, evaluate
from tinymim_export.tables import markdown_table, text_table

__all__ = ["SensitivityResult", "SensitivityRow", "blocks_of", "quantize_within", "sensitivity"]
WORST_CLASSES = 3
LIMIT = 50  # photos scored for each block


@dataclass
class SensitivityRow:
    """One block in INT8, the rest in float.

    Attributes:
        block: Name; "all" for every block at once.
        layers: Number of its layers in INT8.
        miou: mIoU of this file (0 to 1).
        drop: mIoU of the FP32 file minus this one's; negative if it gained.
        equal_pixels: Share of pixels with the same class as in the FP32 file.
        class_drop: Class -> IoU lost, largest loss first; only classes that occur.
        sha256: sha256 of this file.
    """

    block: str
    layers: int
    miou: float
    drop: float
    equal_pixels: float
    class_drop: dict[str, float]
    sha256: str


@dataclass
class SensitivityResult:
    """The cost of quantising each block of a file."""

    file: str
    sha256: str
    precision: str
    miou: float  # of the FP32 file, on the same photos
    images: int
    data: str
    calibration: dict[str, Any] | None
    rows: list[SensitivityRow]  # in the order of the graph; "all" last
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    def worst(self) -> list[SensitivityRow]:
        """Single blocks, the most harmful first."""
        blocks = [row for row in self.rows if row.block != "all"]
        return sorted(blocks, key=lambda row: (-row.drop, row.equal_pixels))

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = {"kind": "tinymim.sensitivity"} | asdict(self)
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def table(self) -> list[list[str]]:
        """Heading and one line per block."""
        lines = [["in INT8", "layers", "mIoU %", "lost", "equal pixels %", "classes that lose most"]]
        for row in self.rows:
            classes = [(name, loss) for name, loss in row.class_drop.items() if loss > 0][:WORST_CLASSES]
            worst = ", ".join(f"{name} -{100 * loss:.2f}" for name, loss in classes) or "none"
            figures = [f"{100 * row.miou:.2f}", f"{100 * row.drop:+.2f}", f"{100 * row.equal_pixels:.2f}"]
            lines.append([row.block, str(row.layers), *figures, worst])
        return lines

    def to_markdown(self) -> str:
        """Title and table."""
        return f"{self._title()}\n\n{markdown_table(self.table())}"

    def print(self) -> None:
        """Table for a terminal."""
        print(f"{self._title()}\n{text_table(self.table())}", flush=True)

    def _title(self) -> str:
        name = Path(self.file).name
        return f"{name} by block, {self.precision}: FP32 {100 * self.miou:.2f} % mIoU on {self.images} photos"


class _Scorer:
    """Scores quantised versions of one file on the same photos, and compares their masks with the FP32 file's."""

    def __init__(
        self, source: FloatFile, data: str | Path, method: str, scoring: Mapping[str, Any], folder: Path
    ) -> None:
        self.source, self.data, self.method, self.scoring, self.folder = source, data, method, scoring, folder
        self.fp32 = self._score(source.path, folder / "fp32")

    def _score(self, file: Path, masks: Path) -> EvalResult:
        return evaluate(file, self.data, masks=masks, quiet=True, **self.scoring)

    def __call__(self, block: str, precision: str, excluded: Sequence[str]) -> SensitivityRow:
        """Score the file in a precision with some blocks left in float."""
        made, layers, _ = self.source.build(precision, excluded, self.method)
        write_metadata(made, {"precision": self.source.about(precision, excluded, self.method), "verified": False})
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            save_proto(made, Path(folder) / "made.onnx")
            result = self._score(Path(folder) / "made.onnx", Path(folder))
            names = [f"{name}.png" for name in self.fp32.names]
            equal = _equal([(self.folder / "fp32" / name, Path(folder) / name) for name in names])
        losses = {
            name: before - after
            for name, before, after in zip(result.classes, self.fp32.class_iou, result.class_iou, strict=True)
            if np.isfinite(before) and np.isfinite(after)
        }
        losses = dict(sorted(losses.items(), key=lambda item: -item[1]))
        drop = self.fp32.miou - result.miou
        return SensitivityRow(block, sum(layers.values()), result.miou, drop, equal, losses, result.sha256)


def _equal(pairs: Sequence[tuple[Path, Path]]) -> float:
    """Share of equal pixels of mask files."""
    from PIL import Image

    same = total = 0
    for left, right in pairs:
        with Image.open(left) as a, Image.open(right) as b:
            equal = np.asarray(a) == np.asarray(b)
        same, total = same + int(equal.sum()), total + equal.size
    return same / max(total, 1)


def sensitivity(
    fp32_onnx: str | Path,
    data: str | Path,
    *,
    precision: str = "int8",
    calibration: str | Path | None = None,
    count: int = 64,
    seed: int = 0,
    method: str = "percentile",
    graph: Sequence[str] = (),
    limit: int | None = LIMIT,
    scoring: Mapping[str, Any] | None = None,
    source: FloatFile | None = None,
) -> SensitivityResult:
    """Quantise one block at a time and score each resulting file.

    Args:
        fp32_onnx: FP32 segmentor file.
        data: Labelled folder (ADE20K layout); its validation photos are scored.
        precision: "int8", "int8-dynamic" or "int8-weights".
        calibration: Folder of calibration photos; None: the training photos of ``data`` ("int8" only).
        count: Number of calibration photos.
        seed: Seed of their choice.
        method: "percentile", "entropy" or "minmax".
        graph: Graph variants to apply first.
        limit: Number of photos to score, evenly spread; None: all.
        scoring: More options of :func:`tinymim_export.runtime.miou.evaluate`: mode, resize_to_file, ignore_label, ...
        source: ``fp32_onnx``, if it is already open.

    Raises:
        ConfigError, DataError: files, options or photos that do not fit.
    """
    kind = find_precision(precision)
    calibration = calibration or data if kind.needs_calibration else None
    check_options(precision, calibration, method, ())
    if not isinstance(kind, LayerwisePrecision):
        raise ConfigError(f"{precision} is not applied per block", "only INT8 is", "use --precision int8")
    source = source or FloatFile(fp32_onnx, graph)
    if calibration is not None and not source.ranges:
        source.calibrate(calibration, count, seed)
    with tempfile.TemporaryDirectory() as folder:
        score = _Scorer(source, data, method, {**(scoring or {}), "limit": limit}, Path(folder))
        rows = _by_block(source, kind, score)
    about = source.about(precision, (), method)
    return SensitivityResult(
        file=str(fp32_onnx),
        sha256=source.sha256,
        precision=" + ".join([precision, *(source.meta.get("graph") or [])]),
        miou=score.fp32.miou,
        images=score.fp32.images,
        data=str(data),
        calibration=about["calibration"],
        rows=rows,
        environment=environment(),
    )


def _by_block(
    source: FloatFile, precision: LayerwisePrecision, score: Callable[..., SensitivityRow]
) -> list[SensitivityRow]:
    """Score each block with layers to quantise, one at a time, then all of them."""
    targets = {target.node.name for target in precision.layers(prepare(source.proto))}
    blocks = [name for name, nodes in source.blocks.items() if targets & set(nodes)]
    if not blocks:
        raise ConfigError(
            f"{source.path.name} has nothing to quantise", "no layer with constant float32 weights", "keep it in FP32"
        )
    progress = Progress("sensitivity", len(blocks) + 1)
    rows = []
    for i, block in enumerate(blocks):
        rows.append(score(block, precision.name, [name for name in source.blocks if name != block]))
        progress.update(i + 1)
    rows.append(score("all", precision.name, ()))
    progress.update(len(blocks) + 1)
    progress.close()
    return rows


def quantize_within(
    fp32_onnx: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    calibration: str | Path | None = None,
    max_miou_drop: float = 0.005,
    precision: str = "int8",
    count: int = 64,
    seed: int = 0,
    method: str = "percentile",
    graph: Sequence[str] = (),
    exclude: Sequence[str] = (),
    photos: str | Path | None = None,
    limit: int | None = None,
    scoring: Mapping[str, Any] | None = None,
) -> QuantizeResult:
    """Quantise as much as a budget of mIoU allows: the most harmful blocks return to float, one by one.

    Args:
        fp32_onnx: FP32 segmentor file.
        out: File to write.
        data: Labelled folder; its validation photos decide.
        calibration: Folder of calibration photos; None: the training photos of ``data``.
        max_miou_drop: mIoU that may be lost, a fraction (0.005 is half a point).
        precision: "int8", "int8-dynamic" or "int8-weights".
        count: Number of calibration photos.
        seed: Seed of their choice.
        method: "percentile", "entropy" or "minmax".
        graph: Graph variants to apply first.
        exclude: Blocks that stay in float from the start.
        photos: Folder of photos on which the file is compared with the FP32 file.
        limit: Number of photos to score; None: all. Single blocks are ranked on at most :data:`LIMIT`.
        scoring: More options of :func:`tinymim_export.runtime.miou.evaluate`.

    Returns:
        The file; ``steps`` lists the choices of blocks that were tried, with the score of each resulting file.

    Raises:
        CheckFailed: no choice of blocks keeps the budget, or the file disagrees with the FP32 file; no file is written.
        ConfigError, DataError: files, options or photos that do not fit.
    """
    calibration = calibration or data if find_precision(precision).needs_calibration else None
    check_options(precision, calibration, method, exclude)
    source = FloatFile(fp32_onnx, graph)
    excluded = choose_blocks(source.blocks, exclude)
    if calibration is not None:
        source.calibrate(calibration, count, seed)
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        score = _Scorer(source, data, method, {**(scoring or {}), "limit": limit}, Path(folder))
        say(f"FP32: {100 * score.fp32.miou:.2f} % mIoU on {score.fp32.images} photos")
        ranked: list[str] | None = None
        while True:
            row = score("all", precision, excluded)
            steps.append({"excluded": list(excluded), "miou": row.miou, "drop": row.drop, "sha256": row.sha256})
            say(
                f"{precision} without {', '.join(excluded) or 'exclusions'}: {100 * row.miou:.2f} % mIoU, "
                f"{100 * row.drop:.2f} lost (budget {100 * max_miou_drop:g})",
            )
            if row.drop <= max_miou_drop:
                break
            if ranked is None:
                ranked = _rank(precision, score, excluded)
            if len(ranked) <= 1:
                raise CheckFailed(
                    f"no choice of blocks keeps {precision} within {100 * max_miou_drop:g} points of mIoU",
                    "; ".join(
                        f"{100 * s['drop']:.2f} lost without {', '.join(s['excluded']) or 'exclusions'}" for s in steps
                    ),
                    "allow more with --max-miou-drop, calibrate on more photos, or use int8-dynamic or int8-weights",
                )
            excluded.append(ranked.pop(0))
    result = quantize(
        fp32_onnx,
        out,
        precision=precision,
        calibration=calibration,
        count=count,
        seed=seed,
        method=method,
        exclude=excluded,
        photos=photos,
        source=source,
    )
    result.steps = steps
    return result


def _rank(precision: str, score: _Scorer, excluded: Sequence[str]) -> list[str]:
    """Blocks still in INT8, the most harmful first."""
    limit = min(score.scoring["limit"] or LIMIT, LIMIT)
    result = sensitivity(
        score.source.path,
        score.data,
        precision=precision,
        method=score.method,
        limit=limit,
        scoring=score.scoring,
        source=score.source,
    )
    result.print()
    return [row.block for row in result.worst() if row.block not in excluded]
