"""INT8 written into a graph: which nodes, weights per output channel, Q/DQ pairs on activations. numpy and onnx.

What ONNX Runtime's CPU kernels do decides the form (measured on ViT-T, a Xeon with VNNI and AMX, ONNX Runtime 1.31):

- activations uint8 with a zero point, weights int8 symmetric: the pair VNNI and AMX multiply (unsigned by signed), and
  the one OpenVINO expects; signed activations were no faster;
- the result of a MatMul is NOT quantised (the stock tool does): ONNX Runtime then runs one MatMulIntegerToFloat, the
  residual stream keeps its precision, and one Q/DQ pair per layer is saved;
- the result of a Conv must be quantised, or the Conv runs in float; a Relu after it moves inside;
- weight-only files hold int8 weights followed by Cast and Mul, which runtimes fold into float weights when they load
  the file: the speed of FP32. DequantizeLinear in their place becomes MatMulNBits on ONNX Runtime's CPU: 1.4 to 2 times
  slower than FP32 here;
- products of two activations (attention's q k^T and p v), softmax and normalisation stay in float, and so do the last
  convolution (its result decides the class and would be cut to 256 levels) and the one that reads the image (the error
  of a ViT-T's features is half as large then, at the same speed).

Where activations are quantised, weights take 7 bits: processors without VNNI (AVX2, the first AVX-512) add pairs of
uint8 x int8 products in 16 bits, and 255 * 127 * 2 overflows where 255 * 63 * 2 does not. One file is right everywhere.
It costs little: cosine of a trained ViT-T's features 0.99975 in place of 0.99984, mIoU 0.02 points of 33.75.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.precision.onnx_graph import Graph, attribute

MAX_OPSET = 20  # see check_opset
WEIGHT_BITS = 7  # signed, in products with uint8
MIN_WEIGHTS = 512  # values; smaller products (pooling by matrices) gain nothing
BEFORE_THE_FIRST = {"Cast", "Mul", "Add", "Sub", "Div", "Pad", "Identity"}
AFTER_THE_LAST = {"Resize", "ArgMax", "Cast", "Slice", "Squeeze", "Identity", "Softmax", "Sigmoid", "Greater"}


@dataclass
class Target:
    """One node whose product runs in INT8."""

    node: Any
    data: str  # activation
    weight: str  # initializer
    axis: int  # of its output channels
    result: str  # of Conv: the tensor that gets a Q/DQ pair (after a Relu); "" for MatMul
    other: str = ""  # in place of a weight: the second factor, an activation (attention's products)


def check_opset(proto: Any) -> None:
    """Refuse operator sets whose quantised graphs are not relied on.

    Raises:
        ConfigError: newer than :data:`MAX_OPSET`, or too old for scales per channel.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not 13 <= opset <= MAX_OPSET:
        raise ConfigError(
            f"INT8 needs an operator set from 13 to {MAX_OPSET}; this file has {opset}",
            "older ones know no scale per channel, newer ones are not handled by ONNX Runtime's INT8 path on every "
            "version in use",
            "export it again with --opset 20 (the default)",
        )


def prepare(proto: Any) -> Graph:
    """One form of a linear layer, in place: Gemm becomes MatMul and Add; and every node gets a name of its own."""
    import onnx

    g = Graph(proto)
    names: set[str] = set()
    for index, node in enumerate(g.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{index}"
        names.add(node.name)
    for node in [node for node in g.graph.node if node.op_type == "Gemm"]:
        weight = g.constant(node.input[1])
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        if weight is None or attribute(node, "transA", 0) or not plain:
            continue
        name = node.input[1]
        if attribute(node, "transB", 0):
            name = g.add_constant(f"{name}_t", weight.T)
        inner = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
        new = [onnx.helper.make_node("MatMul", [node.input[0], name], [inner], name=node.name)]
        if len(node.input) > 2:
            new.append(onnx.helper.make_node("Add", [inner, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
        g.replace(node, new)
    g.refresh()
    return g


def find_targets(g: Graph, operators: Collection[str], *, first_and_last: bool = False) -> list[Target]:
    """Nodes of some operators that can be quantised: those with constant float32 weights.

    Args:
        g: The graph, prepared.
        operators: Out of Conv, ConvTranspose, MatMul.
        first_and_last: Also the convolutions that read the image or decide the class.
    """
    ends = set() if first_and_last else _first_convolutions(g) | _last_convolutions(g)
    targets = []
    for node in g.graph.node:
        weight = g.constant(node.input[1]) if node.op_type in operators and len(node.input) > 1 else None
        if weight is None or weight.dtype != np.float32 or weight.size < MIN_WEIGHTS:
            continue
        if node.op_type == "MatMul" and weight.ndim == 2:
            targets.append(Target(node, node.input[0], node.input[1], 1, ""))
        elif node.op_type == "ConvTranspose":
            if attribute(node, "group", 1) == 1:
                targets.append(Target(node, node.input[0], node.input[1], 1, ""))
        elif node.op_type == "Conv" and node.output[0] not in ends:
            bias = node.input[2] if len(node.input) > 2 else ""
            if bias and g.constant(bias) is None:
                continue
            users = g.users.get(node.output[0], [])
            relu = len(users) == 1 and users[0].op_type == "Relu"
            targets.append(Target(node, node.input[0], node.input[1], 0, (users[0] if relu else node).output[0]))
    return targets


def _first_convolutions(g: Graph) -> set[str]:
    """Results of convolutions that read the image."""
    found, stack = set(), [value.name for value in g.graph.input]
    while stack:
        for node in g.users.get(stack.pop(), []):
            if node.op_type == "Conv":
                found.add(node.output[0])
            elif node.op_type in BEFORE_THE_FIRST:
                stack.append(node.output[0])
    return found


def _last_convolutions(g: Graph) -> set[str]:
    """Results of convolutions that reach an output without another layer in between."""
    return {name for name in decided_after(g) if g.maker[name].op_type == "Conv"}


def decided_after(g: Graph) -> set[str]:
    """What is computed from the last convolution on, its own result included: the decision and its up-sampling."""
    stack, seen = [value.name for value in g.graph.output], set()
    while stack:
        node = g.maker.get(name := stack.pop())
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in AFTER_THE_LAST:
            stack.append(node.input[0])
    return seen


def observed(targets: Collection[Target]) -> list[str]:
    """Tensors whose ranges static quantisation needs, in order."""
    return list(dict.fromkeys(name for t in targets for name in (t.data, t.other, t.result) if name))


def attention_products(g: Graph) -> list[Target]:
    """Both products of every attention: the one whose scores a Softmax reads, and the one that reads its shares."""
    found = []
    for node in g.graph.node:
        if node.op_type != "MatMul" or any(g.constant(name) is not None for name in node.input):
            continue
        users = g.users.get(node.output[0], [])
        users = [user for add in users for user in (g.users.get(add.output[0], []) if add.op_type == "Add" else [add])]
        shares = g.maker.get(node.input[0])
        if any(user.op_type == "Softmax" for user in users) or (shares is not None and shares.op_type == "Softmax"):
            found.append(Target(node, node.input[0], "", 0, "", other=node.input[1]))
    return found


def quantise_weight(weight: np.ndarray, axis: int, bits: int = 8, floor: np.ndarray | float = 0.0) -> Any:
    """Symmetric int8 weights.

    Args:
        weight: float32.
        axis: Of the output channels; each gets its own scale.
        bits: 8 or 7.
        floor: Smallest scale allowed, per channel.

    Returns:
        int8 array, float32 scales (channels,).
    """
    largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    scale = np.maximum(largest / (2 ** (bits - 1) - 1), np.maximum(floor, 1e-20)).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    levels = np.rint(weight / scale.reshape(shape))
    limit = 2 ** (bits - 1) - 1
    return np.clip(levels, -limit, limit).astype(np.int8), scale


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 levels that reach from ``low`` to ``high`` and hit 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / 255, 1e-20))
    return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


def factor_scale(low: float, high: float) -> tuple[np.float32, np.integer[Any]]:
    """Scale and zero point for a factor of a product of two activations: 0 is level 0, signed where values are."""
    if low >= 0:
        return activation_scale(0.0, high)
    return np.float32(max(-low, high, 1e-20) / 127), np.int8(0)


def store(g: Graph, nodes: Collection[Any]) -> None:
    """Replace the node list, then drop the float weights that no node reads any more."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del g.graph.node[:]
    g.graph.node.extend(copies)
    g.refresh()
    g.prune()
