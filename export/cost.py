"""Parameters and multiply-adds of each part of a model, computed once at export and written into the file.

Counted: convolutions, linear layers, both products of attention, and bilinear resizing (4 a value). Not counted:
normalisation, activations, softmax, pooling. The model runs on PyTorch's "meta" device: shapes only, no arithmetic.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinymim.models import ViT
from tinymim_export.originals import Original
from tinymim_export.tables import billions, millions
from tinymim_export.wrappers import PyramidGraph

PARTS = ("backbone", "pyramid", "head", "upsampling")
PYRAMID = ("fpn1.", "fpn2.", "fpn3.", "fpn4.")


def measure_cost(original: Original, size: tuple[int, int], boundaries: dict[str, list[str]]) -> dict[str, Any]:
    """Cost of one image.

    Args:
        original: The model.
        size: Height and width in pixels.
        boundaries: Part -> names of the tensors it ends in, as named in the graph.

    Returns:
        ``{"size": [H, W], "width": D, "head_width": channels, "params", "macs", "parts": {part: {"params", "macs",
        "tensors"}}}``; tensors are the names of what a part ends in.
    """
    model: Any = copy.deepcopy(original.model).to("meta")
    image = torch.zeros(1, 3, *size, device="meta")
    backbone: Any = getattr(model, "backbone", model)
    named = [(name, p.numel()) for name, p in backbone.named_parameters()]
    params = {
        "backbone": sum(n for name, n in named if not name.startswith(PYRAMID)),
        "pyramid": sum(n for name, n in named if name.startswith(PYRAMID)),
    }
    macs: dict[str, int] = {}
    if original.outputs == ("features",):
        macs["backbone"], _ = _macs(backbone, image)
    else:
        neck = model.neck if getattr(model, "with_neck", False) else None
        graph = PyramidGraph(backbone, neck)
        params["pyramid"] += sum(p.numel() for p in neck.parameters()) if isinstance(neck, nn.Module) else 0
        macs["backbone"], taps = _macs(graph.trunk, image)
        macs["pyramid"], levels = _macs(graph.pyramid, taps, image)
        if original.part == "segmentor":
            head = model.decode_head
            params |= {"head": sum(p.numel() for p in head.parameters()), "upsampling": 0}
            macs["head"], scores = _macs(head, levels)
            macs["upsampling"] = 4 * scores.shape[1] * math.prod(size)
    parts = {
        part: {"params": params[part], "macs": macs[part], "tensors": boundaries[part]}
        for part in PARTS
        if part in macs and part in boundaries
    }
    return {
        "size": list(size),
        "width": backbone.embed_dim if isinstance(backbone, ViT) else None,
        "head_width": model.decode_head.channels if original.part == "segmentor" else None,
        "parts": parts,
        "params": sum(row["params"] for row in parts.values()),
        "macs": sum(row["macs"] for row in parts.values()),
    }


def _macs(run: Any, *inputs: Any) -> tuple[int, Any]:
    """Multiply-adds of ``run(*inputs)`` and its result."""
    extra = {torch.ops.aten.upsample_bilinear2d: _bilinear}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        out = run(*inputs)
    return counter.get_total_flops() // 2, out


def _bilinear(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """Two flops for each of four neighbours of every value made."""
    return 8 * math.prod(out_shape)


def describe(cost: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (part, parameters, multiply-adds, share) for a table."""
    total = max(cost["macs"], 1)
    return [
        (part, millions(row["params"]), billions(row["macs"]), f"{100 * row['macs'] / total:.0f} %")
        for part, row in cost["parts"].items()
    ]
