"""FP16 for GPUs: half-precision weights and arithmetic, float32 at the input and the outputs.

What converters are known to get wrong is kept simple here: casts stand at the graph's input and outputs and nowhere
else, weights beyond float16's range are clipped and counted, values that are not numbers any more are found by
verification, and a Resize keeps its scales in float32, as ONNX demands.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.precision.base import Built, Precision, Tolerance, register_precision
from tinymim_export.precision.onnx_graph import attribute

LARGEST, SMALLEST = 65504.0, 2.0**-24
STAY_FLOAT = {"Resize": (1, 2)}  # operator -> inputs that ONNX wants in float32


@register_precision
class Fp16(Precision):
    """float16 weights and arithmetic."""

    name, title = "fp16", "FP16"
    about = "float16 weights and arithmetic, float32 in and out: for GPUs"
    tolerance = Tolerance(0.9999, 0.99)
    targets = ("onnxruntime cuda", "onnxruntime tensorrt")  # on a CPU it is float32 with casts

    def build(self, source: Any, made: Any, excluded: Sequence[str], method: str) -> Built:
        clipped = to_half(made)
        return Built(notes=[f"{clipped} weights were too large for float16 and were clipped"] if clipped else ())


def to_half(proto: Any) -> int:
    """Convert a float32 ModelProto in place.

    Returns:
        How many constants were too large for float16 and were clipped.

    Raises:
        ConfigError: a graph with branches or loops.
    """
    import onnx

    kind, graph = onnx.TensorProto, proto.graph
    clipped = 0

    def half(tensor: Any) -> None:
        nonlocal clipped
        value = onnx.numpy_helper.to_array(tensor)
        clipped += int((np.abs(value) > LARGEST).sum())
        tiny = (value != 0) & (np.abs(value) < SMALLEST)  # an epsilon must not become 0
        value = np.where(tiny, np.copysign(SMALLEST, value), np.clip(value, -LARGEST, LARGEST))
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), tensor.name))

    floats = {
        name
        for node in graph.node
        for at in STAY_FLOAT.get(node.op_type, ())
        for name in node.input[at : at + 1]
        if name
    }
    shared = {
        name
        for node in graph.node
        for at, name in enumerate(node.input)
        if name in floats and at not in STAY_FLOAT.get(node.op_type, ())
    }
    for tensor in list(graph.initializer):
        if tensor.data_type != kind.FLOAT:
            continue
        if tensor.name in shared:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name += "_half"
            half(graph.initializer[-1])
        elif tensor.name not in floats:
            half(tensor)
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("g"):
                raise ConfigError(
                    "FP16 is not possible for this graph",
                    f"{node.op_type} {node.name} holds a branch or a loop",
                    "use --precision fp32",
                )
            if item.HasField("t") and item.t.data_type == kind.FLOAT and node.output[0] not in floats:
                half(item.t)
        if node.op_type == "Cast" and attribute(node, "to") == kind.FLOAT and node.output[0] not in floats:
            next(a for a in node.attribute if a.name == "to").i = kind.FLOAT16
        for at, name in enumerate(node.input):
            if name in shared and at not in STAY_FLOAT.get(node.op_type, ()):
                node.input[at] = f"{name}_half"
    _cast_ends(graph, kind)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == kind.FLOAT and value.name not in floats:
            value.type.tensor_type.elem_type = kind.FLOAT16
    return clipped


def _cast_ends(graph: Any, kind: Any) -> None:
    """One Cast after the float32 input, one before every float32 output."""
    import onnx

    first, last, rename = [], [], {}
    for value in graph.input:
        if value.type.tensor_type.elem_type == kind.FLOAT:
            rename[value.name] = f"{value.name}_half"
            first.append(
                onnx.helper.make_node(
                    "Cast", [value.name], [rename[value.name]], to=kind.FLOAT16, name=rename[value.name]
                )
            )
    for value in graph.output:
        if value.type.tensor_type.elem_type == kind.FLOAT:
            rename[value.name] = f"{value.name}_half"
            last.append(
                onnx.helper.make_node(
                    "Cast", [rename[value.name]], [value.name], to=kind.FLOAT, name=f"{value.name}_cast"
                )
            )
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = rename.get(name, name)
    nodes = [*first, *(type(node).FromString(node.SerializeToString()) for node in graph.node), *last]
    del graph.node[:]
    graph.node.extend(nodes)
