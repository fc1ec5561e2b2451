"""Dynamic INT8: linear layers only, activations quantised by each image's own range; no calibration photos."""

from collections.abc import Collection
from typing import Any

import numpy as np

from tinymim_export.precision.base import Tolerance, register_precision
from tinymim_export.precision.layerwise import LayerwisePrecision
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import WEIGHT_BITS, Target, quantise_weight, store


@register_precision
class Int8Dynamic(LayerwisePrecision):
    """Ranges taken at run time, from each tensor itself."""

    name, title = "int8-dynamic", "dynamic INT8"
    about = "linear layers only, activations quantised by each image's own range: no calibration photos"
    tolerance = Tolerance(0.99, 0.95)
    targets = ("onnxruntime cpu",)  # made for ONNX Runtime's own CPU kernels
    operators = ("MatMul",)
    others = "not done dynamically"

    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        insert_dynamic(graph, targets)


def insert_dynamic(g: Graph, targets: Collection[Target]) -> None:
    """Activations quantised at run time by each tensor's own range (in place); MatMul only."""
    import onnx

    make = onnx.helper.make_node
    by_node = {id(t.node): t for t in targets}
    made: set[str] = set()
    nodes: list[Any] = []
    for node in g.graph.node:
        target = by_node.get(id(node))
        if target is None:
            nodes.append(node)
            continue
        weight = g.constant(target.weight)
        assert weight is not None
        levels, scale = quantise_weight(weight, target.axis, WEIGHT_BITS)
        data, out = target.data, node.output[0]
        parts = [f"{data}_u8", f"{data}_scale", f"{data}_zero"]
        if data not in made:
            nodes.append(make("DynamicQuantizeLinear", [data], parts, name=f"{data}_Q"))
            made.add(data)
        name = node.name
        given = [g.add_constant(f"{name}_weight_int", levels), g.add_constant(f"{name}_weight_scale", scale)]
        zero = g.add_constant(f"{name}_weight_zero", np.zeros(scale.shape, np.int8))
        nodes += [
            make("MatMulInteger", [parts[0], given[0], parts[2], zero], [f"{out}_int"], name=name),
            make("Cast", [f"{out}_int"], [f"{out}_cast"], name=f"{name}_cast", to=onnx.TensorProto.FLOAT),
            make("Mul", [parts[1], given[1]], [f"{out}_step"], name=f"{name}_step"),
            make("Mul", [f"{out}_cast", f"{out}_step"], [out], name=f"{name}_scaled"),
        ]
    store(g, nodes)
