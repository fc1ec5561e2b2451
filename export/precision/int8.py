"""Static INT8: activations quantised by ranges measured on real photos, weights per channel; for CPUs."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tinymim_export.precision.base import Tolerance, register_precision
from tinymim_export.precision.layerwise import LayerwisePrecision
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import WEIGHT_BITS, Target, activation_scale, factor_scale, quantise_weight, store

Ranges = Mapping[str, tuple[float, float]]  # tensor -> smallest and largest value to represent


@register_precision
class Int8(LayerwisePrecision):
    """Q/DQ pairs around convolutions and linear layers."""

    name, title = "int8", "static INT8"
    about = "static: activations quantised by ranges measured on real photos, weights per channel; for CPUs"
    tolerance = Tolerance(0.99, 0.90)
    # the CUDA provider has no INT8 products for graphs with Q/DQ pairs
    targets = ("onnxruntime cpu", "onnxruntime tensorrt", "openvino cpu")
    operators = ("Conv", "MatMul")
    needs_calibration = True

    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        insert_static(graph, targets, {name: h.range(method) for name, h in source.ranges.items()})


def insert_static(g: Graph, targets: Collection[Target], ranges: Ranges) -> None:
    """Q/DQ pairs around the targets (in place): the form that runtimes fuse into INT8 products.

    Args:
        g: The graph, prepared.
        targets: Layers with constant weights, and products of activations.
        ranges: Of every tensor that gets a pair.
    """
    import onnx

    make = onnx.helper.make_node
    made: dict[str, tuple[str, np.float32]] = {}  # tensor -> its dequantised name, its scale
    results = {t.result for t in targets if t.result}
    factors = {name for t in targets if t.other for name in (t.data, t.other)}

    def pair(name: str, source: str, out: str) -> list[Any]:
        scale, zero = (factor_scale if name in factors else activation_scale)(*ranges[name])
        given = [g.add_constant(f"{name}_scale", np.array(scale)), g.add_constant(f"{name}_zero", np.array(zero))]
        made[name] = (out, scale)
        return [
            make("QuantizeLinear", [source, *given], [f"{name}_levels"], name=f"{name}_Q"),
            make("DequantizeLinear", [f"{name}_levels", *given], [out], name=f"{name}_DQ"),
        ]

    by_node = {id(t.node): t for t in targets}
    nodes: list[Any] = []
    for node in g.graph.node:
        target = by_node.get(id(node))
        for at in () if target is None else range(1 + bool(target.other)):
            data = node.input[at]
            if data not in made:
                nodes += pair(data, data, f"{data}_dq")
            node.input[at], scale = made[data]
            if target is not None and target.weight:
                nodes += _weights(g, target, float(scale))
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in results:  # the pair gives the old name: who reads it, and --split, need not know
                node.output[i] = f"{name}_float"
                nodes += pair(name, node.output[i], name)
    store(g, nodes)


def _weights(g: Graph, target: Target, data_scale: float) -> list[Any]:
    """DequantizeLinear nodes for a target's weight and a convolution's bias (int32)."""
    import onnx

    node, weight = target.node, g.constant(target.weight)
    assert weight is not None
    bias = g.constant(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else None
    floor = 0.0 if bias is None else np.abs(bias) / (data_scale * 2.0**30)
    levels, scale = quantise_weight(weight, target.axis, WEIGHT_BITS, floor)
    out = []

    def dequantise(at: int, values: np.ndarray, scales: np.ndarray, axis: int) -> None:
        name = f"{node.name}_{'weight' if at == 1 else 'bias'}"
        inputs = [
            g.add_constant(f"{name}_{kind}", v)
            for kind, v in (("int", values), ("scale", scales), ("zero", np.zeros(scales.shape, values.dtype)))
        ]
        out.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_DQ", axis=axis))
        node.input[at] = f"{name}_dq"

    dequantise(1, levels, scale, target.axis)
    if bias is not None:
        steps = scale * np.float32(data_scale)
        dequantise(2, np.rint(bias / steps.astype(np.float64)).astype(np.int32), steps, 0)
    return out
