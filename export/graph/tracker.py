"""``tracker.pth`` as a verified .onnx file: template and search crop in, box and maps out.

Elimination is in the graph (top-k, gather, scatter). Every output is compared with PyTorch's at batch 1, as trackers
run, and 3; the file appears only if all agree. Normalisation is the caller's, as for every file of ours.
"""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinymim.compat import use_cores
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.files import atomic_path, sha256_file, versions
from tinymim.models.stored import FIX
from tinymim.models.weight_files import weights_file
from tinymim.progress import say
from tinymim.track.stored import TrackerGraph, load_tracker
from tinymim_export.comparison import ParityResult, Row, figures
from tinymim_export.graph.trace import to_onnx
from tinymim_export.runtime.metadata import (
    first_line,
    graph_sha256,
    load_proto,
    mark,
    not_onnx,
    proto_metadata,
    save_proto,
    write_metadata,
)
from tinymim_export.runtime.sessions import PROVIDERS

OUTPUTS = ("box", "confidence", "score", "offset", "size")
INPUTS = ("template", "search")


def export_tracker(
    checkpoint: str | Path, onnx: Path, *, opset: int, seed: int, refused: dict[str, Any]
) -> dict[str, Any]:
    """Export a ``tracker.pth``; the file appears at ``onnx`` only if it passes.

    Args:
        checkpoint: The file of ``tinymim track``.
        onnx: File to write.
        opset: ONNX operator set.
        seed: Seed of the random verification inputs.
        refused: Options that a tracker's file does not have, by name, with what was given.

    Returns:
        Fields of :class:`tinymim_export.graph.convert.ExportResult`.

    Raises:
        CheckFailed: ONNX Runtime and PyTorch disagree.
        CheckpointError: a damaged file.
        ConfigError: a refused option was given.
    """
    if wrong := [name for name, value in refused.items() if value]:
        raise ConfigError(
            f"{wrong[0]} and a tracker",
            "its two inputs have the sizes that it was trained with, and its file says everything else",
            f"leave {wrong[0]} out",
        )
    began = time.monotonic()
    use_cores()
    graph, about = _load(checkpoint)
    config = about["tracker"]
    sides = _sides(config)
    say(f"exporting the tracker, template {sides[0]}, search crop {sides[1]} pixels, opset {opset}")
    inputs = {name: torch.zeros(2, 3, side, side) for name, side in zip(INPUTS, sides, strict=True)}
    proto = to_onnx(graph, inputs, {name: {0: "batch"} for name in INPUTS}, list(OUTPUTS), opset)
    cost = _cost(graph, sides)
    write_metadata(proto, about | {"part": "tracker", "versions": versions(), "cost": cost, "verified": False})
    with atomic_path(onnx) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        proto = load_proto(temporary)  # verify the file as written
        say("verifying against PyTorch: error <= 1e-4 of the largest value, cosine >= 0.999999")
        parity = _compare(proto, graph, onnx.name, seed)
        parity.print()
        parity.require()
        mark(proto, parity.summary())
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return dict(
        onnx=str(onnx),
        part="tracker",
        output=", ".join(OUTPUTS),
        size=(sides[1], sides[1]),
        dynamic=False,
        cost=cost,
        parity=parity,
        seconds=time.monotonic() - began,
        sha256=sha256_file(onnx),
        mib=onnx.stat().st_size / 2**20,
    )


def verify_tracker_file(onnx_path: str | Path, checkpoint: str | Path, *, seed: int) -> ParityResult:
    """Verify an existing file against its checkpoint and update its metadata ``verified``.

    Raises:
        CheckFailed: its values differ from PyTorch's.
        CheckpointError: the checkpoint is damaged, or no tracker.
        DataError: the file is damaged.
    """
    proto, (graph, _) = load_proto(onnx_path), _load(checkpoint)
    result = _compare(proto, graph, Path(onnx_path).name, seed)
    if result.passed:
        mark(proto, result.summary())
    else:
        write_metadata(proto, {"verified": False})
    if result.passed or proto_metadata(proto).get("verified"):
        save_proto(proto, onnx_path)
    result.require()
    return result


def _load(checkpoint: str | Path) -> tuple[TrackerGraph, dict[str, Any]]:
    """The graph, and what the file's metadata say of it."""
    model, meta = load_tracker(checkpoint)
    patch = int(model.backbone.patch_size)
    if not {"mean", "std"} <= meta.keys():
        raise CheckpointError(f"{checkpoint} does not say how crops are normalised", "mean or std is missing", FIX)
    pixels = {key: [round(255 * float(value), 6) for value in meta[key]] for key in ("mean", "std")}
    about = {"tracker": model.config, **pixels, "channel_order": "RGB", "stride": patch, "resize": None}
    return TrackerGraph(model).eval(), about | {
        "checkpoint_sha256": sha256_file(weights_file(checkpoint)),
        "classes": None,
    }


def _sides(config: dict[str, Any]) -> tuple[int, int]:
    """Of template and search crop, pixels."""
    return int(config["template_size"]), int(config["search_size"])


def _cost(graph: TrackerGraph, sides: tuple[int, int]) -> dict[str, Any]:
    """Parameters and multiply-adds of one frame; both crops go through the backbone each time."""
    model: Any = copy.deepcopy(graph.model)
    template, search = (torch.zeros(1, 3, side, side) for side in sides)
    with torch.no_grad(), FlopCounterMode(display=False) as backbone:
        features = model.features(template, search)
    with torch.no_grad(), FlopCounterMode(display=False) as head_macs:
        model.head(features)
    macs = [counter.get_total_flops() // 2 for counter in (backbone, head_macs)]
    head = sum(p.numel() for p in model.head.parameters())
    unused = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)  # prefix tokens, old positions
    params = (sum(p.numel() for p in model.parameters()) - head - unused, head)
    parts = {
        name: {"params": p, "macs": m, "tensors": []}
        for name, p, m in zip(("backbone", "head"), params, macs, strict=True)
    }
    width = int(model.backbone.embed_dim)
    return {"size": [sides[1]] * 2, "width": width, "parts": parts, "params": sum(params), "macs": sum(macs)}


def _compare(proto: Any, graph: TrackerGraph, file: str, seed: int) -> ParityResult:
    """Every output of random crops at batch 1 and 3; and a remark whether the scores of other crops would pass, too."""
    result = ParityResult(file, graph_sha256=graph_sha256(proto))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        raw = proto.SerializeToString()
        session = ort.InferenceSession(raw, options, providers=[PROVIDERS["cpu"].title])
    except Exception as error:  # onnxruntime raises several kinds
        raise not_onnx(file, error) from error
    have = {item.name: tuple(item.shape[1:]) for item in session.get_inputs()}
    wanted = {name: (3, side, side) for name, side in zip(INPUTS, _sides(graph.model.config), strict=True)}
    if have != wanted:
        raise DataError(f"{file} is not a file of this tracker", f"it takes {have}, not {wanted}", "export it again")
    random = np.random.default_rng(seed)
    for batch in (1, 3):
        views = {name: random.standard_normal((batch, *shape)).astype(np.float32) for name, shape in wanted.items()}
        with torch.no_grad():
            ours = graph(*(torch.from_numpy(view) for view in views.values()))
        try:
            theirs = dict(zip(OUTPUTS, session.run(list(OUTPUTS), views), strict=True))
        except Exception as error:  # onnxruntime raises several kinds
            row = Row("graph", (batch, *wanted["search"]), "random", remark=first_line(error))
            return ParityResult(file, [*result.rows, row], result.graph_sha256)
        for name in OUTPUTS:
            row = Row(name, (batch, *wanted["search"]), "random")
            result.rows.append(figures(row, theirs[name], ours[name].numpy()))
    other = {name: random.standard_normal(view.shape).astype(np.float32) for name, view in views.items()}
    control = Row("score", (batch, *wanted["search"]), "other crops for the file alone")
    control = figures(control, session.run(["score"], other)[0], ours["score"].numpy())
    told = "NOT told apart: this output does not depend on the crops" if control.passed else "told apart, as it must be"
    control.passed, control.remark = True, told
    result.rows.append(control)
    return result
