"""What a format is, the registry, and the one way from an .onnx file to another format: written aside, run, compared.

The .onnx file is the reference: it was compared with PyTorch when it was exported. What is made of it runs on the same
photos on its own runtime, and appears only if it gives the same.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import numpy as np

from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import atomic_path, sha256_file, versions, write_json
from tinymim_export.comparison import Row, cosine
from tinymim_export.precision.base import Tolerance, find_precision
from tinymim_export.runtime.engines import Engine, open_engine, random_input
from tinymim_export.runtime.metadata import precision_name
from tinymim_export.runtime.photos import load_photos, normalise
from tinymim_export.tables import markdown_table

PHOTOS = 4
FP32 = Tolerance(0.99999, 0.999)  # of another runtime's float32
REFUSED = {  # known formats that no file here can be written in, and why
    "coreml": "coremltools has read no ONNX since version 6, and what it writes runs on macOS only: nothing to compare",
    "litert": "litert-torch 0.10 wants torch below 2.15, this is newer; LiteRT itself reads no ONNX",
    "tensorrt": "an engine file fits one GPU only: run the .onnx by --runtime onnxruntime --provider tensorrt",
}


@dataclass(frozen=True)
class Start:
    """What an .onnx file was exported from; see :func:`tinymim_export.graph.convert.export`."""

    checkpoint: str | Path
    config: str | Path | None = None
    part: str | None = None
    num_heads: int | None = None


class Format(ABC):
    """A format that an .onnx file is converted to.

    Attributes:
        name: Word of ``--format``.
        title: Its name in sentences.
        suffix: Of the file that names it.
        precisions: Those that it makes itself of an FP32 file, its default first; a file of another precision stays in
            that.
        runtime: Word of ``--runtime`` of the engine that opens it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    runtime: ClassVar[str]

    @abstractmethod
    def write(self, onnx: Path, out: Path, precision: str, start: Start | None) -> list[Path]:
        """Convert a file.

        Args:
            onnx: What to convert.
            out: The file to write, in a folder of its own.
            precision: One of ``precisions``, or the file's own.
            start: The checkpoint, where it is at hand.

        Returns:
            All that was written: ``out`` last, which the others belong to.

        Raises:
            ConfigError: the package is missing, or an operator has no counterpart.
        """


FORMATS: dict[str, Format] = {}
FormatClass = TypeVar("FormatClass", bound=type[Format])


def register_format(kind: FormatClass) -> FormatClass:
    """Class decorator: the format becomes a choice of ``--format``.

    Raises:
        ConfigError: the name is taken.
    """
    if kind.name in FORMATS:
        raise ConfigError(f"format {kind.name!r} is registered already", f"by {type(FORMATS[kind.name])}", "rename it")
    FORMATS[kind.name] = kind()
    return kind


def find_format(name: str) -> Format:
    """A format by its word.

    Raises:
        ConfigError: unknown, or refused.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name in REFUSED:
        raise ConfigError(f"--format {name} is not possible", REFUSED[name], f"known: {', '.join(FORMATS)}")
    raise ConfigError(f"format {name!r} is unknown", f"known: {', '.join(FORMATS)}", "choose one of them")


@dataclass
class FormatResult:
    """Files of another format, and how they compare with the .onnx file."""

    file: str
    source: str
    source_sha256: str
    format: str
    precision: str
    files: dict[str, dict[str, Any]]  # name -> sha256, mib
    rows: list[Row] = field(repr=False)
    versions: dict[str, str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"kind": "tinymim.format"} | vars(self) | {"rows": [vars(row) for row in self.rows]}

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        if path is not None:
            write_json(path, self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self) -> str:
        """A table of the files."""
        lines = [["file", "MiB", "sha256"]]
        return markdown_table(lines + [[n, f"{f['mib']:.2f}", f["sha256"]] for n, f in self.files.items()])

    def print(self) -> None:
        """One line for the comparison, one a file."""
        for row in self.rows:
            print(f"  {row}")
        for name, about in self.files.items():
            print(
                f"{Path(self.file).with_name(name)}: {self.precision}, {about['mib']:.2f} MiB, {about['sha256'][:12]}"
            )


def convert(
    onnx: str | Path,
    out: str | Path,
    *,
    format: str,
    precision: str | None = None,
    graph: Sequence[str] = (),
    photos: str | Path | None = None,
    seed: int = 0,
    start: Start | None = None,
    **options: Any,
) -> FormatResult:
    """Convert an .onnx file; the new files appear only if they give what it gives.

    Args:
        onnx: A file of tinymim-export with one batch of images as its input.
        out: The file to write.
        format: One of :data:`FORMATS`.
        precision: Of an FP32 file: one of the format's own, or another, which the .onnx file is given first; None: the
            file's precision.
        graph: Graph variants that the .onnx file is given first.
        photos: Folder of real photos to compare on; None: noise, on which only the cosine counts.
        seed: Of the noise, and of the choice of calibration photos.
        start: What the .onnx file was exported from; formats that are lowered from PyTorch need it.
        options: Calibration for INT8: those of :func:`tinymim_export.precision.quantize.quantize`.

    Raises:
        CheckFailed: other values.
        ConfigError, DataError: a format, precision or file that does not fit.
    """
    kind, onnx, out = find_format(format), Path(onnx), Path(out)
    if out.suffix != kind.suffix:
        raise ConfigError(f"{out} is no name for {kind.title}", f"it is a {kind.suffix}", f"{out.stem}{kind.suffix}")
    with TemporaryDirectory() as folder:
        if graph or precision not in (None, *kind.precisions):
            from tinymim_export.precision.quantize import quantize

            reduced = Path(folder) / f"{out.stem}.onnx"
            first = "fp32" if precision is None or precision in kind.precisions else precision
            quantize(onnx, reduced, precision=first, graph=graph, photos=photos, seed=seed, **options)
            onnx, precision = reduced, precision if precision in kind.precisions else None
        return _convert(kind, onnx, out, precision, photos, seed, start)


def _convert(
    kind: Format,
    onnx: Path,
    out: Path,
    precision: str | None,
    photos: str | Path | None,
    seed: int,
    start: Start | None,
) -> FormatResult:
    """:func:`convert` of a file as it is."""
    source = open_engine(onnx)
    own = precision_name(source.meta)
    precision = precision or own
    if precision != own and (own != "fp32" or precision not in kind.precisions):
        raise ConfigError(
            f"{onnx.name} is {own} and cannot become {precision} in {kind.title}",
            f"it makes {' and '.join(kind.precisions)} of an FP32 file; any other file keeps its precision",
            "leave --precision out, or start at the FP32 file or the checkpoint",
        )
    images = _images(source, photos, seed)
    with TemporaryDirectory() as folder:
        made = kind.write(onnx, Path(folder) / out.name, precision, start)
        row = _compare(source, open_engine(made[-1], runtime=kind.runtime), images, precision, photos is not None)
        if not row.passed:
            raise CheckFailed(
                f"{out.name} does not give what {onnx.name} gives", str(row), "use another precision, or the .onnx file"
            )
        about = {f.name: {"sha256": sha256_file(f), "mib": f.stat().st_size / 2**20} for f in made}
        for file in made:  # the named one last
            with atomic_path(out.with_name(file.name)) as part:
                shutil.copyfile(file, part)
    return FormatResult(str(out), onnx.name, source.sha256, kind.name, precision, about, [row], versions())


def _images(source: Engine, photos: str | Path | None, seed: int) -> list[np.ndarray]:
    """Inputs (1, 3, h, w) of the .onnx file."""
    _, _, height, width = source.some_shape()
    if photos is None:
        return [random_input((1, 3, height, width), source.dtype, seed)]
    pixels = source.dtype == np.uint8
    contract = source.meta | ({"input": {"range": "pixels"}} if pixels else {})
    return [normalise(photo, (height, width), contract)[None] for photo in load_photos(photos, limit=PHOTOS)]


def _compare(theirs: Engine, ours: Engine, images: Sequence[np.ndarray], precision: str, real: bool) -> Row:
    """Both files on the same inputs; where they decide, equal pixels of photos count, too."""
    tolerance = FP32 if precision == "fp32" else find_precision(precision).tolerance
    wanted, got = (np.concatenate([engine.run(image) for image in images]) for engine in (theirs, ours))
    row = Row(theirs.output, (len(images), *images[0].shape[1:]), "photos" if real else "random")
    if got.shape != wanted.shape:
        row.remark = f"gives {got.shape}, not {wanted.shape}"
        return row
    decided = np.issubdtype(wanted.dtype, np.integer)
    row.passed = True
    if not decided:
        a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        row.max_error = float(np.abs(a - b).max())
        row.relative_error, row.cosine = row.max_error / max(float(np.abs(b).max()), 1e-12), cosine(a, b)
        row.passed = bool(row.cosine >= tolerance.cosine)  # False for NaN
    if decided or theirs.output == "logits":
        ids = [x if decided else x[:, 0] > 0 if x.shape[1] == 1 else x.argmax(axis=1) for x in (got, wanted)]
        row.equal_pixels = float((ids[0] == ids[1]).mean())
        row.passed = row.passed and (not real or row.equal_pixels >= tolerance.equal_pixels)
    return row
