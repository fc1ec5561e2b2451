"""FP32 file in, file of another precision out: converted, compared with the FP32 file, described in its metadata.

The precisions are those of :data:`tinymim_export.precision.PRECISIONS`, one file of this room each.

BF16 is not a precision of a file: ONNX Runtime has no bfloat16 products on CPUs. OpenVINO runs the FP32 file in it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import atomic_path, environment, sha256_file, write_json
from tinymim.progress import say
from tinymim_export.comparison import ParityResult
from tinymim_export.precision.agreement import compare_files, summary, tolerance_of
from tinymim_export.precision.base import PRECISIONS, by_block, find_precision
from tinymim_export.precision.blocks import choose_blocks
from tinymim_export.precision.calibrate import METHODS
from tinymim_export.precision.float_file import FloatFile
from tinymim_export.runtime.metadata import check_verified, load_proto, mark, proto_metadata, save_proto, write_metadata

__all__ = ["PRECISIONS", "FloatFile", "QuantizeResult", "check_options", "quantize", "verify_file"]


@dataclass
class QuantizeResult:
    """One file of another precision; prints, writes JSON and Markdown.

    Attributes:
        file: What was written.
        sha256: Of it.
        precision: Its name.
        mib: Its size.
        parent: The FP32 file, with ``parent_sha256`` and ``parent_mib``.
        graph: Graph variants in it.
        layers: Operator -> nodes whose weights are in the new precision.
        left: Why a layer stayed in float -> how many.
        excluded: Blocks left in float.
        calibration: As in the metadata.
        parity: Comparison with the FP32 file.
        verified: Compared, and the FP32 file itself was verified against PyTorch.
        notes: Sentences.
        steps: What the automatic exclusion did: {"excluded", "miou", "drop"}, one entry per step.
    """

    file: str
    sha256: str
    precision: str
    mib: float
    parent: str
    parent_sha256: str
    parent_mib: float
    graph: list[str]
    layers: dict[str, int]
    left: dict[str, int]
    excluded: list[str]
    calibration: dict[str, Any] | None
    parity: ParityResult
    verified: bool
    seconds: float
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = {"kind": "tinymim.export"} | asdict(self) | {"parity": json.loads(self.parity.to_json())}
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def to_markdown(self) -> str:
        """Summary, remarks and parity table."""
        lines = [f"`{Path(self.file).name}`: {self.summary()}", "", *(f"- {text}" for text in self._remarks()), ""]
        return "\n".join(lines) + "\n" + self.parity.to_markdown()

    def summary(self) -> str:
        """One line."""
        what = " + ".join([self.precision, *self.graph])
        state = "verified" if self.verified else "NOT verified against PyTorch"
        return f"{what}, {self.mib:.1f} MiB (FP32 {self.parent_mib:.1f}), {state}, sha256 {self.sha256[:12]}"

    def _remarks(self) -> list[str]:
        out = []
        if by_block(self.precision):
            count = ", ".join(f"{n} {op}" for op, n in self.layers.items())
            out.append(f"in INT8: {count or 'nothing'}")
            if self.left:
                out.append("in float: " + ", ".join(f"{n} {why}" for why, n in self.left.items()))
        if self.excluded:
            out.append(f"blocks left in float: {', '.join(self.excluded)}")
        if self.calibration:
            about = self.calibration
            out.append(
                f"ranges of {about['count']} photos of {about['folder']}, {about['method']}, seed {about['seed']}"
            )
        return out + self.notes

    def print(self) -> None:
        """Remarks, then where the file is."""
        for text in self._remarks():
            print(text)
        print(f"wrote {self.file}: {self.summary()} ({self.seconds:.0f} s)", flush=True)


def quantize(
    onnx_in: str | Path,
    onnx_out: str | Path,
    *,
    precision: str,
    calibration: str | Path | None = None,
    count: int = 64,
    seed: int = 0,
    method: str = "percentile",
    exclude: Sequence[str] = (),
    graph: Sequence[str] = (),
    photos: str | Path | None = None,
    source: FloatFile | None = None,
) -> QuantizeResult:
    """Write a file in another precision; it appears at ``onnx_out`` only if it agrees with the FP32 file.

    Args:
        onnx_in: FP32 file.
        onnx_out: File to write.
        precision: One of :data:`PRECISIONS`.
        calibration: Folder of photos like those the file will see, for a precision that needs them ("int8"); the list
            of files is kept in the metadata.
        count: Calibration photos.
        seed: Of their choice.
        method: How a range is read off: "percentile", "entropy" or "minmax".
        exclude: Blocks to leave in float (:func:`tinymim_export.precision.blocks.blocks_of`).
        graph: Graph variants to apply (:data:`tinymim_export.precision.variants.VARIANTS`).
        photos: Folder of photos to compare on; without it calibration photos that were not used, or noise.
        source: ``onnx_in`` opened before, with its variants and measured ranges.

    Raises:
        CheckFailed: values differ from the FP32 file's by more than the precision's tolerance; no file is written.
        ConfigError, DataError: options, files or photos that do not fit.
    """
    began = time.monotonic()
    onnx_in, onnx_out = Path(onnx_in), Path(onnx_out)
    check_options(precision, calibration, method, exclude)
    if onnx_out.is_dir() or onnx_out.resolve() == onnx_in.resolve():
        raise ConfigError(
            f"cannot write {onnx_out}", "it is a folder, or the FP32 file itself", "choose another --onnx"
        )
    source = source or FloatFile(onnx_in, graph)
    excluded = choose_blocks(source.blocks, exclude)
    if find_precision(precision).needs_calibration and not source.ranges:
        assert calibration is not None
        source.calibrate(calibration, count, seed)
    made, layers, left = source.build(precision, excluded, method)
    if by_block(precision) and not layers:
        raise ConfigError(
            f"nothing of {onnx_in.name} would be in INT8",
            "every block is excluded" if excluded else "it has no layer with constant float32 weights",
            "exclude fewer blocks" if excluded else "use --precision fp32",
        )
    about = source.about(precision, excluded, method)
    write_metadata(made, {"precision": about, "verified": False})
    with atomic_path(onnx_out) as temporary:
        temporary.write_bytes(made.SerializeToString(deterministic=True))
        made = load_proto(temporary)  # what is compared is what was written
        meta = proto_metadata(made)
        parity = _agree(source, made, onnx_out.name, photos, seed)
        verified = source.verified
        mark(made, summary(parity, meta, source.sha256), verified)
        temporary.write_bytes(made.SerializeToString(deterministic=True))
    notes = list(dict.fromkeys(source.notes))
    if not verified:
        notes.append(
            "the FP32 file is not verified, or was changed since: tinymim-export --verify-only FILE --checkpoint ..."
        )
    return QuantizeResult(
        file=str(onnx_out),
        sha256=sha256_file(onnx_out),
        precision=precision,
        mib=onnx_out.stat().st_size / 2**20,
        parent=str(onnx_in),
        parent_sha256=source.sha256,
        parent_mib=onnx_in.stat().st_size / 2**20,
        graph=list(meta.get("graph") or []),
        layers=layers,
        left=left,
        excluded=excluded,
        calibration=about["calibration"],
        parity=parity,
        verified=verified,
        seconds=time.monotonic() - began,
        notes=notes,
        environment=environment(),
    )


def verify_file(file: str | Path, fp32: str | Path, *, photos: str | Path | None = None, seed: int = 0) -> ParityResult:
    """Compare an existing file with the FP32 file it was made from and set or take away its mark accordingly.

    Raises:
        CheckFailed: other values, or another FP32 file than the one it names as its parent.
        ConfigError, DataError: files that cannot be compared.
    """
    made, source = load_proto(file), FloatFile(fp32)
    meta = proto_metadata(made)
    parent = (meta.get("precision") or {}).get("parent_sha256")
    if parent is None:
        raise ConfigError(
            f"{file} does not say what it was made from",
            "only files written with --precision or --graph name their FP32 file",
            "verify it against PyTorch: tinymim-export --verify-only FILE --checkpoint ...",
        )
    if parent != source.sha256:
        raise CheckFailed(
            f"{file} was not made from {fp32}",
            f"it names {parent[:12]} as its FP32 file, this one is {source.sha256[:12]}",
            "give the right FP32 file, or make the file again",
        )
    recorded = (meta.get("parity") or {}).get("graph_sha256")
    try:
        result = _agree(source, made, Path(file).name, photos, seed)
        changed = meta.get("verified") and check_verified(file, meta) is False
        if changed or recorded not in (None, result.graph_sha256):
            raise CheckFailed(
                f"{file} was changed after it was verified", "its graph or contract has another hash", "make it again"
            )
    except CheckFailed:
        write_metadata(made, {"verified": False})
        save_proto(made, file)
        raise
    if not meta.get("verified") and source.verified:
        mark(made, summary(result, meta, source.sha256))
        save_proto(made, file)
    return result


def check_options(precision: str, calibration: Any, method: str, exclude: Sequence[str]) -> None:
    """Refuse options that do not belong together.

    Raises:
        ConfigError: naming what to type.
    """
    if precision == "bf16":
        raise ConfigError(
            "BF16 is not a file",
            "ONNX Runtime has no bfloat16 products on CPUs; OpenVINO runs the FP32 file in bfloat16",
            "export without --precision, then: tinymim bench FILE.onnx --runtime openvino --precision bf16",
        )
    kind = find_precision(precision)
    if method not in METHODS:
        raise ConfigError(f"calibration method {method!r} is unknown", f"known: {', '.join(METHODS)}", "choose one")
    if kind.needs_calibration and calibration is None:
        raise ConfigError(
            f"{kind.title} needs photos",
            "it fixes the range of every activation beforehand, and only photos like those the file will see show them",
            "add --calibration FOLDER, or use --precision int8-dynamic",
        )
    if not kind.needs_calibration and calibration is not None:
        able = " and ".join(other.title for other in PRECISIONS.values() if other.needs_calibration)
        raise ConfigError(f"--calibration does nothing for {precision}", f"only {able} measures ranges", "leave it out")
    if exclude and not kind.operators:
        raise ConfigError(f"{precision} excludes no blocks", "only INT8 is made block by block", "leave the blocks out")


def _agree(source: FloatFile, made: Any, file: str, photos: str | Path | None, seed: int) -> ParityResult:
    """Compare, print, and raise where the tolerance is not met."""
    meta, pairs = proto_metadata(made), source.photo_pairs(made, photos)
    tolerance = tolerance_of(meta)
    seen = f"{len(pairs)} photos" if pairs else "noise"
    say(
        f"comparing with the FP32 file on {seen}: cosine >= {tolerance.cosine:g}"
        + (f", equal pixels >= {100 * tolerance.equal_pixels:g} %" if pairs else ""),
    )
    parity = compare_files(made, source.original, file=file, photos=pairs, seed=seed)
    parity.print()
    if not parity.passed:
        failed = next(row for row in parity.rows if not row.passed)
        raise CheckFailed(
            f"{file} does not give what the FP32 file gives "
            f"({sum(not row.passed for row in parity.rows)} of {len(parity.rows)} checks failed)",
            f"{failed}; tolerance of {' + '.join([meta['precision']['name'], *(meta.get('graph') or [])])}: "
            f"cosine {tolerance.cosine:g}, equal pixels {100 * tolerance.equal_pixels:g} %",
            "find the blocks that suffer with --sensitivity --data FOLDER and leave them in float with --exclude-blocks"
            if by_block(meta["precision"]["name"])
            else "use another precision, or fewer graph variants",
        )
    return parity
