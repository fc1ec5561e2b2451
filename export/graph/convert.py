"""Export a checkpoint to a verified .onnx file."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError
from tinymim.files import atomic_path, sha256_file, versions, write_json
from tinymim.progress import say
from tinymim.track.stored import read_tracker_meta
from tinymim_export.graph.contract import fixed_input
from tinymim_export.graph.cost import describe, measure_cost
from tinymim_export.graph.own_test import own_test
from tinymim_export.graph.parity import ParityResult, compare
from tinymim_export.graph.torch_model import load_torch_model
from tinymim_export.graph.trace import OPSET, trace
from tinymim_export.graph.tracker import export_tracker
from tinymim_export.runtime.metadata import load_proto, mark, write_metadata
from tinymim_export.runtime.photos import load_photos

LARGEST_SIDE = 8192  # pixels


@dataclass
class ExportResult:
    """One exported, verified file; prints, writes JSON and Markdown."""

    onnx: str
    part: str
    output: str
    size: tuple[int, int]
    dynamic: bool
    cost: dict[str, Any]
    parity: ParityResult
    seconds: float
    sha256: str = ""
    mib: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = {"kind": "tinymim.export"} | asdict(self) | {"parity": json.loads(self.parity.to_json())}
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def to_markdown(self) -> str:
        """Summary, cost table and parity table."""
        lines = [f"`{Path(self.onnx).name}`: {self._sentence()}", "", "| part | parameters | multiply-adds | share |"]
        lines += ["|---|---|---|---|"] + ["| " + " | ".join(row) + " |" for row in describe(self.cost)]
        return "\n".join(lines) + "\n\n" + self.parity.to_markdown()

    def _sentence(self) -> str:
        size = "any height and width" if self.dynamic else f"{self.size[0]}x{self.size[1]}, any batch"
        test = self.parity.test_step()
        own = f" ({test['equal']} of {test['pixels']} pixels as the model's own test)" if test else ""
        return f"{self.part} -> {self.output}, {size}, {self.mib:.1f} MiB, verified{own}, sha256 {self.sha256[:12]}"

    def print(self) -> None:
        """Print the cost by part, then the file."""
        print(f"cost at {self.cost['size'][0]}x{self.cost['size'][1]}, one image:")
        for part, params, macs, share in describe(self.cost):
            print(f"  {part:<11} {params:>10} parameters {macs:>10} multiply-adds {share:>6}")
        for note in self.notes:
            print(f"note: {note}")
        print(f"wrote {self.onnx}: {self._sentence()} ({self.seconds:.0f} s)", flush=True)


def export(
    checkpoint: str | Path,
    onnx: str | Path,
    *,
    config: str | Path | None = None,
    part: str | None = None,
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    output: str = "logits",
    photos: str | Path | None = None,
    num_heads: int | None = None,
    opset: int = OPSET,
    seed: int = 0,
) -> ExportResult:
    """Export a checkpoint to ONNX and verify it; the file appears at ``onnx`` only if it passes.

    Args:
        checkpoint: ``segmentor.pth``, ``tracker.pth``, ``classifier.pth``, ``student.pth`` or any that we can read.
        onnx: File to write.
        config: MMSegmentation configuration; None: the one stored in ``segmentor.pth``.
        part: "segmentor", "backbone" or "classifier"; None: a segmentor if the file is one, else the backbone.
        size: Height and width (pixels) fixed in the file; None: the size that photos or windows come to by the
            configuration (a ViT's img_size), dynamic where whole photos come to different sizes.
        dynamic: Leave height and width dynamic.
        output: "logits" float32 (N, C, H, W) or "mask" uint8 (N, H, W); segmentors only.
        photos: Folder of real photos to also verify on.
        num_heads: Heads per block, for foreign ViT files.
        opset: ONNX operator set.
        seed: Seed of the random verification inputs.

    Raises:
        CheckFailed: ONNX Runtime and PyTorch disagree; no file is written at ``onnx``.
        ConfigError, CheckpointError, DataError: options or files that do not fit.
    """
    began = time.monotonic()
    onnx = Path(onnx)
    _check_options(onnx, size, dynamic)
    if photos is not None:
        load_photos(photos, limit=1)  # fails before the work, not after it
    if read_tracker_meta(checkpoint) is not None:
        given = {"--size": size, "--dynamic": dynamic, "--config": config, "--num-heads": num_heads, "--part": part}
        given |= {"--photos": photos, "--output mask": output == "mask"}
        return ExportResult(**export_tracker(checkpoint, onnx, opset=opset, seed=seed, refused=given))
    loaded = load_torch_model(checkpoint, config=config, part=part, num_heads=num_heads)
    if loaded.part != "segmentor" and output == "mask":
        raise ConfigError(
            f"a {loaded.part} cannot output a mask",
            "it has no class for each pixel",
            "leave --output out, or use --part segmentor",
        )
    at, dynamic = size or loaded.size, dynamic or (size is None and loaded.free)
    loaded.require_size(at, dynamic=dynamic)
    mode = "dynamic height and width" if dynamic else "fixed size"
    say(f"exporting the {loaded.part} at {at[0]}x{at[1]}, {mode}, opset {opset}")
    traced = trace(loaded, at, dynamic=dynamic, output=output, opset=opset)
    cost = measure_cost(loaded, at, traced.boundaries, traced.pieces)
    proto = traced.proto
    write_metadata(
        proto, {"part": loaded.part} | loaded.contract | {"versions": versions(), "cost": cost, "verified": False}
    )
    with atomic_path(onnx) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        proto = load_proto(temporary)  # verify the file as written
        say(
            "verifying against PyTorch: error <= 1e-4 of the largest value, cosine >= 0.999999"
            + (", equal pixels >= 99.9 %, also of the model's own test_step" if loaded.part == "segmentor" else ""),
        )
        parity = compare(proto, loaded, file=onnx.name, photos=photos, seed=seed)
        if loaded.part == "segmentor":
            parity.rows.append(own_test(loaded, proto, None if photos is None else load_photos(photos, limit=1)[0]))
        parity.print()
        parity.require()
        mark(proto, parity.summary())
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    notes, rule = list(loaded.notes), loaded.contract.get("resize") or {}
    if loaded.part == "segmentor" and rule["mode"] == "whole" and not dynamic and fixed_input(rule) != at:
        tested = "x".join(map(str, fixed_input(rule) or ())) or "sizes that depend on theirs"
        notes.append(
            f"the model was tested on photos brought to {tested}, this file accepts only {at[0]}x{at[1]}: for other "
            "photos eval, predict and --tune need --resize-to-file; an export without --size takes what the model takes"
        )
    return ExportResult(
        onnx=str(onnx),
        part=loaded.part,
        output=output if loaded.part == "segmentor" else ", ".join(loaded.outputs),
        size=at,
        dynamic=dynamic,
        cost=cost,
        parity=parity,
        seconds=time.monotonic() - began,
        sha256=sha256_file(onnx),
        mib=onnx.stat().st_size / 2**20,
        notes=notes,
    )


def _check_options(onnx: Path, size: tuple[int, int] | None, dynamic: bool) -> None:
    if size is not None and dynamic:
        raise ConfigError(
            "--size and --dynamic exclude each other", "a dynamic file accepts every size", "leave one of them out"
        )
    if size is not None and not (len(size) == 2 and all(1 <= side <= LARGEST_SIDE for side in size)):
        raise ConfigError(
            f"size {' '.join(map(str, size))} is not possible",
            f"height and width are whole numbers of pixels from 1 to {LARGEST_SIDE}",
            "e.g. --size 512 512",
        )
    if onnx.is_dir():
        raise ConfigError(f"{onnx} is a folder", "--onnx must name a file", f"e.g. --onnx {onnx / 'model.onnx'}")
