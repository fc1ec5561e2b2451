"""Static INT8 with more of the graph in 8 bits: the placement that OpenVINO runs fast.

OpenVINO computes in INT8 what reads quantised tensors, so besides the layers of ``int8`` these are quantised, too:

- both products of every attention (q k^T and p v), which OpenVINO runs as one kernel with the softmax between them;
- transposed convolutions (ViT's pyramid);
- what a bilinear Resize inside the network reads, and both sides of the addition behind it (feature pyramids).

The residual stream, normalisations and the softmax itself stay in float. ONNX Runtime has no kernel for most of these
and would round and compute in float: there, ``int8`` is the faster file.
"""

from collections.abc import Collection
from typing import Any

from tinymim_export.precision.base import register_precision
from tinymim_export.precision.int8 import Int8, insert_static
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import Target, decided_after


@register_precision
class Int8Wide(Int8):
    """Q/DQ pairs also around attention's products, transposed convolutions, resizes and additions behind them."""

    name, title = "int8-wide", "wide static INT8"
    about = "static INT8 of attention's products, transposed convolutions and feature pyramids, too; for OpenVINO"
    targets = ("openvino cpu",)
    operators = ("Conv", "ConvTranspose", "MatMul")

    def activations(self, graph: Graph) -> list[str]:
        others = [node.input[at] for node, at in wide_inputs(graph)]
        return list(dict.fromkeys([*super().activations(graph), *others]))

    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        ranges = {name: h.range(method) for name, h in source.ranges.items()}
        insert_static(graph, targets, ranges, wide_inputs(graph))


def wide_inputs(g: Graph) -> list[tuple[Any, int]]:
    """(node, which of its inputs) of what is quantised beyond the layers."""
    found: list[tuple[Any, int]] = []
    last = decided_after(g)
    for node in g.graph.node:
        if node.op_type == "Resize" and node.output[0] not in last:
            found.append((node, 0))
        elif node.op_type == "Add" and any(
            name in g.maker and g.maker[name].op_type == "Resize" for name in node.input
        ):
            found += [(node, 0), (node, 1)]
    return found
