"""Static INT8 with SmoothQuant: outlier channels are evened out in the normalisation in front of a product.

A LayerNormalization's channels differ in reach by orders of magnitude in a trained ViT, and one scale has to hold them
all. Dividing channel c by s_c in the normalisation (gamma and beta) and multiplying row c of the weights behind it by
s_c changes nothing in float, adds no node, and leaves channels of like reach: s_c = sqrt(reach of the activation /
reach of the weights).

Source: Xiao and others, SmoothQuant, ICML 2023 (alpha 0.5).
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.precision.base import register_precision
from tinymim_export.precision.int8 import Int8, insert_static
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import Target


@register_precision
class Int8Smooth(Int8):
    """Q/DQ pairs as in ``int8``, after smoothing."""

    name, title = "int8-smooth", "static INT8 with SmoothQuant"
    about = "static INT8 after outlier channels were evened out in the LayerNorms (SmoothQuant); for transformers"

    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        ranges = {name: h.range(method) for name, h in source.ranges.items()}
        smoothed = smooth(graph, {name: h.channels for name, h in source.ranges.items() if h.channels is not None})
        for target in targets:
            target.weight = target.node.input[1]
        insert_static(graph, targets, ranges | smoothed)


def smooth(g: Graph, reach: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Even out the channels of every normalisation that feeds products only (in place).

    Args:
        g: The graph, prepared.
        reach: Normalised tensor -> smallest and largest value of every channel (2, channels).

    Returns:
        The smoothed tensors' ranges: the extremes, for outliers are gone.

    Raises:
        ConfigError: no such normalisation.
    """
    ranges: dict[str, tuple[float, float]] = {}
    outputs = {value.name for value in g.graph.output}
    for node in [node for node in g.graph.node if node.op_type == "LayerNormalization"]:
        name, users = node.output[0], g.users.get(node.output[0], [])
        gains = [g.constant(at) for at in node.input[1:]]
        weights = [g.constant(user.input[1]) if user.op_type == "MatMul" else None for user in users]
        if name not in reach or name in outputs or any(value is None or value.ndim != 1 for value in gains):
            continue
        if not users or any(weight is None or weight.ndim != 2 for weight in weights):
            continue
        low, high = reach[name]
        act = np.maximum(-low, high)
        rows = np.max([np.abs(weight).max(axis=1) for weight in weights if weight is not None], axis=0)
        factor = np.sqrt(np.divide(act, rows, out=np.ones_like(act), where=(act > 0) & (rows > 0)), dtype=np.float32)
        for at, value in enumerate(gains, 1):
            node.input[at] = g.add_constant(f"{name}_smooth{at}", value / factor)
        for user, weight in zip(users, weights, strict=True):
            user.input[1] = g.add_constant(f"{user.input[1]}_smooth", weight * factor[:, None])
        ranges[name] = float((low / factor).min()), float((high / factor).max())
    if not ranges:
        raise ConfigError(
            "SmoothQuant does not fit this file",
            "none of its LayerNormalization nodes feeds only products with constant weights",
            "use --precision int8",
        )
    return ranges
