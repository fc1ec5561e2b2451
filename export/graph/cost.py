"""Parameters and multiply-adds of each part of a model, computed once at export and written into the file.

Counted: convolutions, linear layers, both products of attention, and bilinear resizing (4 per value). Not counted:
normalisation, activations, softmax, pooling. The model runs on PyTorch's "meta" device: shapes only, no arithmetic.
Parts that the outputs do not depend on (unread levels, auxiliary heads) are not in the file and not counted.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tinymim.models import Backbone
from tinymim_export.graph.torch_model import TorchModel
from tinymim_export.graph.wrappers import PyramidGraph, SegmentorGraph, as_list
from tinymim_export.tables import billions, millions

PARTS = ("backbone", "pyramid", "head", "upsampling")
NARROW = 64  # channels of the narrowest proposed head and pyramid


@dataclass
class Piece:
    """One part of a model, traced separately."""

    macs: int
    params: int
    read: list[bool]  # for each input: does the output depend on it?
    out: Any


@dataclass
class Pieces:
    """All parts of a model at one size."""

    parts: dict[str, Piece]
    unread: list[str]  # names of taps and levels that the output does not depend on
    taps: Any = None  # without values: on PyTorch's "meta" device
    levels: Any = None


def measure_cost(
    loaded: TorchModel, size: tuple[int, int], boundaries: dict[str, list[str]], found: Pieces
) -> dict[str, Any]:
    """Cost of one image.

    Args:
        loaded: The model.
        size: Height and width in pixels.
        boundaries: Part -> names of its output tensors in the graph.
        found: Result of :func:`pieces` at this size.

    Returns:
        ``{"size": [H, W], "width": D, "head": class, "head_width": channels, "unread": [level names], "params", "macs",
        "parts": {part: {"params", "macs", "tensors"}}, "narrower": [{"options", "macs": {part: macs}}]}``; tensors are
        the names of a part's outputs, narrower is the cost of smaller widths of head and pyramid.
    """
    backbone: Any = getattr(loaded.model, "backbone", loaded.model)
    head: Any = loaded.model.decode_head if loaded.part == "segmentor" else None
    parts = {
        part: {"params": piece.params, "macs": piece.macs, "tensors": boundaries[part]}
        for part, piece in found.parts.items()
    }
    return {
        "size": list(size),
        "width": getattr(backbone, "embed_dim", None) if isinstance(backbone, Backbone) else None,
        "head": None if head is None else type(head).__name__,
        "head_width": None if head is None else head.channels,
        "unread": [name for name in found.unread if name.startswith("level") and "pyramid" in found.parts],
        "narrower": [] if head is None else narrower(loaded.model, found, size),
        "parts": parts,
        "params": sum(row["params"] for row in parts.values()),
        "macs": sum(row["macs"] for row in parts.values()),
    }


def pieces(loaded: TorchModel, size: tuple[int, int]) -> Pieces:
    """Split a model into its parts, from the last to the first; of each, only the outputs that the next part reads.

    Args:
        loaded: The model.
        size: Height and width in pixels.
    """
    model: Any = copy.deepcopy(loaded.model).to("meta")
    image = torch.zeros(1, 3, *size, device="meta")
    if loaded.outputs in (("features",), ("class_logits",)):
        return Pieces({loaded.part: _piece(model, image)}, [])
    parts: dict[str, Piece] = {}
    graph = PyramidGraph(model)
    with torch.no_grad():
        taps = graph.trunk(image)
        levels = graph.pyramid(taps, image)
    read = [True] * len(as_list(levels))
    if loaded.part == "segmentor":
        parts["head"] = _piece(SegmentorGraph(model, "logits").scores, levels)
        parts["upsampling"] = Piece(4 * parts["head"].out.shape[1] * math.prod(size), 0, [True], None)
        read = parts["head"].read
    flags = {f"level{i}": flag for i, flag in enumerate(read)}
    if graph.has_pyramid:
        parts["pyramid"] = _piece(lambda taps: _some(graph.pyramid(taps, image), read), taps)
        read = parts["pyramid"].read
        flags |= {f"tap{i}": flag for i, flag in enumerate(read)}
    parts["backbone"] = _piece(lambda image: _some(graph.trunk(image), read), image)
    unread = [name for name in flags if not flags[name]]
    return Pieces({part: parts[part] for part in PARTS if part in parts}, unread, taps, levels)


def totals(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters and multiply-adds of a segmentor whose head reads every level, a hundred times faster than
    :func:`pieces`, which also finds what is not read.

    Args:
        model: A segmentor; on PyTorch's meta device nothing is computed.
        size: Height and width in pixels.
    """
    backbone, head = model.backbone, model.decode_head
    never = {id(p) for part in backbone.parts_after(backbone.out_indices[-1]) for p in part.parameters()}
    params = {id(p): p.numel() for part in (backbone, head) for p in part.parameters() if id(p) not in never}
    image = torch.zeros(1, 3, *size, device=next(head.parameters()).device)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.upsample_bilinear2d: _bilinear}) as counter,
    ):
        scores = head(backbone(image))
    return sum(params.values()), counter.get_total_flops() // 2 + 4 * scores.shape[1] * math.prod(size)


def narrower(model: Any, found: Pieces, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Multiply-adds of the same segmentor with a narrower head, and with its own head on a narrower pyramid."""
    from mmseg.registry import MODELS

    cfg: Any = model.cfg.model
    out: list[dict[str, Any]] = []
    width = getattr(model.backbone, "embed_dim", None) or cfg.decode_head.channels // 2
    aux: Any = cfg.get("auxiliary_head")
    with torch.device("meta"):
        for channels in sorted({width, NARROW}, reverse=True):
            options = f"model.decode_head.channels={channels}"
            if isinstance(aux, dict) and aux["channels"] > channels:
                options += f" model.auxiliary_head.channels={channels}"
            try:
                assert channels < cfg.decode_head.channels
                head = MODELS.build({**cfg.decode_head, "channels": channels}).eval()
            except AssertionError:  # not narrower, or the head needs its input's width
                continue
            out.append({"options": options, "macs": {"head": _piece(head, found.levels).macs}})
        wide, four = as_list(found.levels)[0].shape[1], [NARROW] * 4
        own = getattr(model.backbone, "fpn_names", ()) and not model.with_neck
        if own and wide > NARROW and list(found.parts["head"].read) == [True] * 4:
            backbone = MODELS.build({**cfg.backbone, "pyramid_dim": NARROW}).eval()
            head = MODELS.build({**cfg.decode_head, "in_channels": four}).eval()
            image = torch.zeros(1, 3, *size)
            pyramid = _piece(lambda taps: backbone.pyramid(taps, image.shape[-2:]), found.taps)
            options = f"model.backbone.pyramid_dim={NARROW} model.decode_head.in_channels={four}".replace(", ", ",")
            if isinstance(aux, dict):
                options += f" model.auxiliary_head.in_channels={NARROW}"
            macs = {"pyramid": pyramid.macs, "head": _piece(head, pyramid.out).macs}
            out.append({"options": options, "macs": macs})
    return out


def _some(features: Any, read: Sequence[bool]) -> list[Tensor]:
    return [value for value, flag in zip(as_list(features), read, strict=True) if flag]


def _piece(run: Any, inputs: Any) -> Piece:
    """Trace ``run(inputs)`` on shapes, drop what its result does not depend on, and count the rest."""
    extra = {torch.ops.aten.upsample_bilinear2d: _bilinear}
    with torch.no_grad():
        # functionalize: otherwise in-place operations would always count as needed
        graph = make_fx(torch.func.functionalize(lambda x: run(x)))(inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        with FlopCounterMode(display=False, custom_mapping=extra) as counter:
            out = graph(inputs)
    nodes = list(graph.graph.nodes)
    used = {node.target: getattr(graph, node.target) for node in nodes if node.op == "get_attr"}
    return Piece(
        macs=counter.get_total_flops() // 2,
        params=sum(value.numel() for value in used.values() if isinstance(value, nn.Parameter)),
        read=[bool(node.users) for node in nodes if node.op == "placeholder"],
        out=out,
    )


def _bilinear(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """FLOP of bilinear resizing: two for each of the four neighbours of every output value."""
    return 8 * math.prod(out_shape)


def describe(cost: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (part, parameters, multiply-adds, share) for a table."""
    total = max(cost["macs"], 1)
    return [
        (part, millions(row["params"]), billions(row["macs"]), f"{100 * row['macs'] / total:.0f} %")
        for part, row in cost["parts"].items()
    ]
