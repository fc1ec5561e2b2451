"""Graph variants that spare work around products, exact but for rounding. numpy and onnx.

Legend: B = images, N = tokens, h = heads, d = channels of a head, D = h d, C = channels.
"""

from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.precision.onnx_graph import Graph, attribute
from tinymim_export.runtime.metadata import proto_metadata, write_metadata


def merge_convolutions(proto: Any) -> int:
    """One transposed convolution in place of a transposed one and the 1x1 convolution behind it (in place).

    Nothing stands between the last up-sampling of ViT's pyramid and UPerHead's lateral convolution, so both are one
    linear map: with K of W (C_in, C, k, k) and the 1x1 weights V (C_out, C), sum_C W V. Kernels must not overlap
    (stride k), and the result must take fewer products.

    Returns:
        How many were merged.

    Raises:
        ConfigError: there is no such pair.
    """
    g = Graph(proto)
    outputs = {value.name for value in g.graph.output}
    merged = 0
    for node in [node for node in g.graph.node if node.op_type == "ConvTranspose"]:
        users = g.users.get(node.output[0], [])
        if node.output[0] in outputs or len(users) != 1 or not _plain(users[0], "Conv"):
            continue
        after = users[0]
        (weight, bias), (mix, shift) = _weights(g, node), _weights(g, after)
        if weight is None or mix is None or mix.shape[2:] != (1, 1) or not _plain(node, "ConvTranspose"):
            continue
        if list(attribute(node, "strides", [1, 1])) != list(weight.shape[2:]):
            continue
        given, between, made = len(weight), weight.shape[1], len(mix)
        level = node.output[0]
        if given * made >= between * (given + made):
            continue
        flat = mix[:, :, 0, 0].astype(np.float64)
        name = after.output[0]
        node.input[1] = g.add_constant(f"{name}_merged", np.einsum("icyx,oc->ioyx", weight, flat).astype(np.float32))
        total = flat @ (np.zeros(between) if bias is None else bias) + (0 if shift is None else shift)
        del node.input[2:]
        node.input.append(g.add_constant(f"{name}_merged_bias", total.astype(np.float32)))
        node.output[0] = name
        _note_cost(g, level, node.input[0], (given * between, between * made, given * made))
        g.replace(after, [])
        g.refresh()
        merged += 1
    if not merged:
        raise ConfigError(
            "the graph variant 'merged' does not fit this file",
            "no transposed convolution is followed by a 1x1 convolution alone",
            "leave the variant out",
        )
    g.prune()
    return merged


def _note_cost(g: Graph, level: str, before: str, macs: tuple[int, int, int]) -> None:
    """Metadata ``cost`` after a merge: the part that gave ``level`` gives ``before``, the next one has the product.

    ``macs``: of the transposed convolution, the 1x1 one and the merged one, for every pixel of ``level``.
    """
    meta = proto_metadata(g.proto)
    cost = meta.get("cost") or {}
    parts = cost.get("parts") or {}
    names = list(parts)
    at = next((i for i, name in enumerate(names) if level in parts[name]["tensors"]), len(names))
    value = next((v for v in g.graph.value_info if v.name == level), None)
    sides = [] if value is None else [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
    if at + 1 >= len(names) or len(sides) != 2:
        return
    own, following = parts[names[at]], parts[names[at + 1]]
    own["tensors"] = [before if name == level else name for name in own["tensors"]]
    pixels = sides[0] * sides[1]
    own["macs"] -= pixels * macs[0]
    following["macs"] += pixels * (macs[2] - macs[1])
    cost["macs"] = sum(part["macs"] for part in parts.values())
    write_metadata(g.proto, {"cost": cost})


def _plain(node: Any, kind: str) -> bool:
    """Whether a convolution has no padding, dilation or groups (and a 1x1 one no stride)."""
    usual: dict[str, Any] = {"pads": [0], "output_padding": [0], "dilations": [1], "group": [1]}
    if kind == "Conv":
        usual["strides"] = [1]
    return node.op_type == kind and all(
        set(np.atleast_1d(attribute(node, name, value)).tolist()) == set(value) for name, value in usual.items()
    )


def _weights(g: Graph, node: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Constant weights and bias; (None, None) where one of them is computed."""
    values = [g.constant(name) for name in node.input[1:] if name]
    if not values or any(value is None for value in values):
        return None, None
    return values[0], values[1] if len(values) > 1 else None


def three_products(g: Graph, qkv: str) -> list[str] | None:
    """q, k and v of an attention by three products in place of one that has to be cut.

    Args:
        g: The graph; products and weights are added.
        qkv: The joint tensor (B, N, 3D): a product with constant weights, and a constant added to it.

    Returns:
        Names of q, k and v, (B, N, D); None where ``qkv`` is made in another way.
    """
    import onnx

    add = g.maker.get(qkv)
    product, bias = add, None
    if add is not None and add.op_type == "Add":
        side = next((i for i in (0, 1) if g.constant(add.input[i]) is not None), None)
        if side is None:
            return None
        product, bias = g.maker.get(add.input[1 - side]), g.constant(add.input[side])
    weight = g.constant(product.input[1]) if product is not None and product.op_type == "MatMul" else None
    if (
        weight is None
        or weight.ndim != 2
        or weight.shape[1] % 3
        or (bias is not None and bias.shape != weight.shape[1:])
    ):
        return None
    assert product is not None
    names, nodes = [], []
    for at, letter in enumerate("qkv"):
        part = slice(at * weight.shape[1] // 3, (at + 1) * weight.shape[1] // 3)
        name = f"{qkv}_{letter}"
        inner = name if bias is None else f"{name}_product"
        given = [product.input[0], g.add_constant(f"{name}_weight", weight[:, part])]
        nodes.append(onnx.helper.make_node("MatMul", given, [inner], name=inner))
        if bias is not None:
            shift = g.add_constant(f"{name}_bias", bias[part])
            nodes.append(onnx.helper.make_node("Add", [inner, shift], [name], name=name))
        names.append(name)
    at = next(i for i, node in enumerate(g.graph.node) if node is add or node == add)
    for offset, node in enumerate(nodes, 1):
        g.graph.node.insert(at + offset, node)
    return names
