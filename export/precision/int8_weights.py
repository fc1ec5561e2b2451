"""INT8 weights under float arithmetic: a quarter of the size at FP32's speed."""

from collections.abc import Collection
from typing import Any

from tinymim_export.precision.base import Tolerance, register_precision
from tinymim_export.precision.layerwise import LayerwisePrecision
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import Target, quantise_weight, store


@register_precision
class Int8Weights(LayerwisePrecision):
    """Weights in int8, scaled back to float32 when the runtime loads the file."""

    name, title = "int8-weights", "INT8 weights"
    about = "int8 weights, float arithmetic: a quarter of the size at FP32's speed"
    tolerance = Tolerance(0.999, 0.98)
    targets = ("onnxruntime cpu",)  # packed weights are made for ONNX Runtime's own CPU kernels
    operators = ("Conv", "ConvTranspose", "MatMul")
    first_and_last = True

    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        insert_weights(graph, targets)


def insert_weights(g: Graph, targets: Collection[Target]) -> None:
    """Only the weights in int8 (in place): float arithmetic, a quarter of the size."""
    import onnx

    by_node = {id(t.node): t for t in targets}
    made: dict[str, str] = {}
    nodes: list[Any] = []
    for node in g.graph.node:
        target = by_node.get(id(node))
        if target is not None and target.weight not in made:
            weight, name = g.constant(target.weight), target.weight
            assert weight is not None
            levels, scale = quantise_weight(weight, target.axis)
            shape = [-1 if i == target.axis else 1 for i in range(weight.ndim)]
            given = [g.add_constant(f"{name}_int", levels), g.add_constant(f"{name}_scale", scale.reshape(shape))]
            made[name] = f"{name}_float"
            nodes += [
                onnx.helper.make_node("Cast", given[:1], [f"{name}_cast"], name=f"{name}_cast", to=1),
                onnx.helper.make_node("Mul", [f"{name}_cast", given[1]], [made[name]], name=made[name]),
            ]
        if target is not None:
            node.input[1] = made[target.weight]
        nodes.append(node)
    store(g, nodes)
