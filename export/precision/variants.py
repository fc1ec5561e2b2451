"""Graph variants of a verified FP32 file, each kept only where it is measured to pay. Needs onnx, no PyTorch.

``attention``     the ten to thirty nodes of each block's attention become one com.microsoft MultiHeadAttention node,
                  and q, k, v three products in place of one that has to be cut
``merged``        a transposed convolution and the 1x1 convolution behind it become one (products.py)
``pixels``        the file takes uint8 RGB pixels and normalises them itself, in the patch embedding where that is exact
``early-argmax``  the decision is made before the up-sampling, on a quarter of the sides: fewer operations, other pixels
                  along every border between classes (approximate: how many pixels differ is measured and printed)

ONNX Runtime's own transformer optimiser finds no attention in today's exports (heads are cut out of one tensor by Slice
and Squeeze, the scale sits on both factors), so the pattern is matched here: backwards from every Softmax, by what the
nodes compute, not by their names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim_export.precision.onnx_graph import Graph, attribute
from tinymim_export.precision.products import merge_convolutions, three_products
from tinymim_export.runtime.metadata import proto_metadata, write_metadata

VARIANTS = ("attention", "merged", "pixels", "early-argmax")
APPROXIMATE = ("early-argmax",)  # the others change rounding only


def apply_variants(proto: Any, variants: Sequence[str]) -> Any:
    """A copy of the model with graph variants applied, in the order of :data:`VARIANTS`.

    Args:
        proto: ModelProto of an FP32 file.
        variants: Names out of :data:`VARIANTS`.

    Returns:
        A new ModelProto; its metadata lists the variants under ``graph`` and, for "pixels", says so under ``input``.

    Raises:
        ConfigError: an unknown variant, or one that does not fit this graph.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        known = f"known: {', '.join(VARIANTS)}"
        raise ConfigError(f"graph variant {unknown[0]!r} is unknown", known, "choose from them")
    made = type(proto)()
    made.CopyFrom(proto)
    meta = proto_metadata(made)
    done = list(meta.get("graph") or [])
    for name in VARIANTS:
        if name in variants and name not in done:
            _APPLY[name](made)
            done.append(name)
    write_metadata(made, {"graph": done})
    return made


# attention --------------------------------------------------------------------------------------------------------
# Legend: B = images, N = tokens, h = heads, d = channels of a head, D = h d.


def fuse_attention(proto: Any) -> int:
    """Replace every self-attention by one MultiHeadAttention node (in place); return how many.

    Matched: (B, N, 3D) -> Reshape (B, N, 3, h, d) -> Transpose (3, B, h, N, d) -> q, k, v;
    softmax(scale q k^T + bias) v -> Transpose (B, N, h, d) -> Reshape (B, N, D).
    The bias (relative positions) stays an input of the fused node.

    Raises:
        ConfigError: no such attention in the graph.
    """
    import onnx

    g = Graph(proto)
    blocks = [found for node in g.graph.node if node.op_type == "Softmax" for found in [_match(g, node)] if found]
    if not blocks:
        raise ConfigError(
            "the graph variant 'attention' does not fit this file",
            f"none of its {sum(n.op_type == 'Softmax' for n in g.graph.node)} softmax nodes belongs to a "
            "self-attention with one qkv projection",
            "leave the variant out",
        )
    for index, (qkv, heads, scale, bias, last) in enumerate(blocks):
        name = f"attention_{index + 1}"
        parts, new = three_products(g, qkv), []
        if parts is None:
            parts = [f"{name}_{letter}" for letter in "qkv"]
            new = [onnx.helper.make_node("Split", [qkv], parts, name=f"{name}_split", axis=2, num_outputs=3)]
        new += [
            onnx.helper.make_node(
                "MultiHeadAttention",
                [*parts, *(["", "", bias] if bias else [])],
                [last.output[0]],
                name=name,
                domain="com.microsoft",
                num_heads=heads,
                scale=scale,
            ),
        ]
        g.replace(last, new)
    g.prune()
    if not any(entry.domain == "com.microsoft" for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return len(blocks)


def _match(g: Graph, softmax: Any) -> tuple[str, int, float, str, Any] | None:
    """(qkv tensor, heads, scale, name of the bias or "", the last node) of the attention around a Softmax, or None."""
    if attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    product = _only(g.users.get(softmax.output[0], []), "MatMul")
    scores, bias = g.maker.get(softmax.input[0]), ""
    if scores is not None and scores.op_type == "Add":
        made = [g.maker.get(name) for name in scores.input]
        side = next((i for i, node in enumerate(made) if node is not None and node.op_type == "MatMul"), None)
        if side is None:
            return None
        bias, scores = scores.input[1 - side], made[side]
    if product is None or product.input[0] != softmax.output[0] or scores is None or scores.op_type != "MatMul":
        return None
    q, q_scale = _through_scale(g, scores.input[0])
    k, k_scale = _through_scale(g, scores.input[1])
    transposed = _through_transpose(g, k)
    heads = [_head(g, name) for name in (q, transposed or "", product.input[1])]
    if any(head is None for head in heads) or [head[1] for head in heads if head] != [0, 1, 2]:
        return None
    sources = {head[0] for head in heads if head}
    turn = _only(g.users.get(product.output[0], []), "Transpose")
    last = None if turn is None else _only(g.users.get(turn.output[0], []), "Reshape")
    if len(sources) != 1 or turn is None or last is None or list(attribute(turn, "perm")) != [0, 2, 1, 3]:
        return None
    permute = g.maker[sources.pop()]
    reshape = g.maker.get(permute.input[0])
    if list(attribute(permute, "perm")) != [2, 0, 3, 1, 4] or reshape is None or reshape.op_type != "Reshape":
        return None
    count = _heads(g, reshape)
    return None if count is None else (reshape.input[0], count, q_scale * k_scale, bias, last)


def _only(nodes: Sequence[Any], kind: str) -> Any | None:
    """The single user of a tensor, if it is of this kind."""
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == kind else None


def _through_scale(g: Graph, name: str) -> tuple[str, float]:
    """Step over a multiplication with one number: (what was multiplied, the number)."""
    node = g.maker.get(name)
    if node is not None and node.op_type == "Mul":
        for i in (0, 1):
            value = g.constant(node.input[i])
            if value is not None and value.size == 1:
                return node.input[1 - i], float(value.reshape(()))
    return name, 1.0


def _through_transpose(g: Graph, name: str) -> str | None:
    """The (B, h, N, d) tensor whose last two axes were swapped to give ``name``: one Transpose, or the exporter's three
    steps Reshape (B h, N, d), Transpose, Reshape (B, h, d, N)."""
    node = g.maker.get(name)
    if node is None:
        return None
    if node.op_type == "Transpose" and list(attribute(node, "perm")) == [0, 1, 3, 2]:
        return str(node.input[0])
    if node.op_type != "Reshape":
        return None
    swap = g.maker.get(node.input[0])
    if swap is None or swap.op_type != "Transpose" or list(attribute(swap, "perm")) != [0, 2, 1]:
        return None
    flat = g.maker.get(swap.input[0])
    return str(flat.input[0]) if flat is not None and flat.op_type == "Reshape" else None


def _head(g: Graph, name: str) -> tuple[str, int] | None:
    """(tensor of q, k and v, which of the three) that ``name`` was cut out of by Slice and Squeeze, or by Gather."""
    node = g.maker.get(name)
    if node is None:
        return None
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 0:
        index = g.constant(node.input[1])
        return None if index is None or index.size != 1 else (node.input[0], int(index.reshape(())))
    if node.op_type != "Squeeze":
        return None
    cut = g.maker.get(node.input[0])
    if cut is None or cut.op_type != "Slice" or len(cut.input) < 4:
        return None
    start, end, axes = (g.constant(cut.input[i]) for i in (1, 2, 3))
    if start is None or end is None or axes is None or start.size != 1 or int(axes.reshape(())) != 0:
        return None
    first = int(start.reshape(()))
    return (cut.input[0], first) if int(end.reshape(())) == first + 1 and first in (0, 1, 2) else None


def _heads(g: Graph, reshape: Any) -> int | None:
    """The number of heads in a Reshape to (B, N, 3, h, d), whose shape is a constant or a Concat with constants."""
    shape = g.constant(reshape.input[1])
    if shape is not None:
        return int(shape[3]) if shape.size == 5 else None
    joined = g.maker.get(reshape.input[1])
    if joined is None or joined.op_type != "Concat":
        return None
    parts = [g.constant(name) for name in joined.input]
    sizes = [1 if part is None else part.size for part in parts]
    if sum(sizes) != 5:
        return None
    values = [value for part in parts for value in ([None] if part is None else part.reshape(-1).tolist())]
    return None if values[3] is None else int(values[3])


# pixels -----------------------------------------------------------------------------------------------------------


def take_pixels(proto: Any) -> None:
    """Make the input uint8 pixels (N, 3, H, W), RGB, and normalise in the graph (in place).

    Where the image goes into convolutions without padding only (a ViT's patch embedding), the constants are folded into
    their weights: conv(w, (x - mean) / std) + b = conv(w / std, x) + b - sum(w mean / std). Elsewhere (padding happens
    after normalisation) the graph begins with a multiplication and an addition.

    Raises:
        ConfigError: the file does not say its mean and std.
    """
    import onnx

    meta = proto_metadata(proto)
    if not meta.get("mean") or not meta.get("std"):
        raise ConfigError(
            "the graph variant 'pixels' does not fit this file",
            "its metadata give no mean and std",
            "use a file written by tinymim-export",
        )
    mean, std = np.array(meta["mean"], np.float64), np.array(meta["std"], np.float64)
    g = Graph(proto)
    image = proto.graph.input[0]
    users = [node for node in g.users[image.name] if node.op_type != "Shape"]
    cast = f"{image.name}_float"
    nodes = [onnx.helper.make_node("Cast", [image.name], [cast], name=cast, to=onnx.TensorProto.FLOAT)]
    if all(_foldable(g, node) for node in users):
        for node in users:
            weight, bias = g.constant(node.input[1]), g.constant(node.input[2]) if len(node.input) > 2 else None
            assert weight is not None
            scaled = weight.astype(np.float64) / std[None, :, None, None]
            shift = (scaled * mean[None, :, None, None]).sum(axis=(1, 2, 3))
            shifted = (0.0 if bias is None else bias.astype(np.float64)) - shift
            name = node.input[1]
            inputs = [
                cast,
                g.add_constant(f"{name}_pixels", scaled.astype(np.float32)),
                g.add_constant(f"{name}_pixels_bias", shifted.astype(np.float32)),
            ]
            del node.input[:]
            node.input.extend(inputs)
    else:
        factor = g.add_constant("pixels_factor", (1 / std).astype(np.float32).reshape(1, 3, 1, 1))
        shift = g.add_constant("pixels_shift", (-mean / std).astype(np.float32).reshape(1, 3, 1, 1))
        nodes.append(onnx.helper.make_node("Mul", [cast, factor], ["pixels_scaled"], name="pixels_scaled"))
        nodes.append(onnx.helper.make_node("Add", ["pixels_scaled", shift], ["normalised"], name="normalised"))
        for node in g.users[image.name]:
            for i, name in enumerate(node.input):
                if name == image.name:
                    node.input[i] = "normalised"
    for offset, node in enumerate(nodes):
        proto.graph.node.insert(offset, node)
    image.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    Graph(proto).prune()
    write_metadata(proto, {"input": {"range": "pixels"}})


def _foldable(g: Graph, node: Any) -> bool:
    """Whether a node is a convolution of the image with constant weights and no padding."""
    if node.op_type != "Conv" or any(attribute(node, "pads", [0])) or attribute(node, "group", 1) != 1:
        return False
    automatic = attribute(node, "auto_pad", b"NOTSET")
    known = [g.constant(name) is not None for name in node.input[1:]]
    return automatic in (b"NOTSET", b"VALID", "NOTSET", "VALID") and all(known)


# early argmax -----------------------------------------------------------------------------------------------------


def decide_early(proto: Any) -> None:
    """Move the ArgMax of a mask file in front of its last bilinear Resize, which becomes a nearest one (in place).

    Raises:
        ConfigError: the file gives no mask of several classes made by an ArgMax after a Resize.
    """
    import onnx

    g = Graph(proto)
    out = proto.graph.output[0].name
    cast = g.maker.get(out)
    pick = None if cast is None else g.maker.get(cast.input[0])
    resize = None if pick is None else g.maker.get(pick.input[0])
    right = [("Cast", cast), ("ArgMax", pick), ("Resize", resize)]
    if any(node is None or node.op_type != kind for kind, node in right):
        raise ConfigError(
            "the graph variant 'early-argmax' does not fit this file",
            "it moves the decision of a mask file in front of the last up-sampling, and there is no such pair here",
            "export with --output mask, or leave the variant out",
        )
    assert resize is not None
    assert cast is not None
    scores = resize.input[0]
    axes = g.add_constant("early_axis", np.array([1], np.int64))
    small, small_u8, big = "early_ids", "early_mask", "early_resized"
    sides, target = [], []  # the Resize's scales or sizes, for height and width only
    for name in resize.input[2:]:
        value = None if not name else g.constant(name)
        if value is not None:
            name = g.add_constant("early_target", value[2:])
        elif name:
            bounds = [
                g.add_constant(f"early_{word}", np.array([at], np.int64)) for word, at in (("from", 2), ("to", 4))
            ]
            sides.append(onnx.helper.make_node("Slice", [name, *bounds], ["early_target"], name="early_target"))
            name = "early_target"
        target.append(name)
    new = [
        onnx.helper.make_node("ArgMax", [scores], [small], name=small, axis=1, keepdims=1),
        onnx.helper.make_node("Cast", [small], [small_u8], name=small_u8, to=onnx.TensorProto.UINT8),
        *sides,
        onnx.helper.make_node(
            "Resize",
            [small_u8, "", *target],
            [big],
            name=big,
            mode="nearest",
            axes=[2, 3],
            coordinate_transformation_mode="half_pixel",
            nearest_mode="round_prefer_floor",
        ),
        onnx.helper.make_node("Squeeze", [big, axes], [out], name="early_squeeze"),
    ]
    g.replace(cast, new)
    g.refresh()
    g.prune()
    meta = proto_metadata(proto)
    parts = (meta.get("cost") or {}).get("parts") or {}
    if "upsampling" in parts:
        parts["upsampling"] = parts["upsampling"] | {"macs": 0, "tensors": [out]}
        cost = meta["cost"]
        cost["macs"] = sum(part["macs"] for part in parts.values())
        write_metadata(proto, {"cost": cost})


_APPLY = {
    "attention": fuse_attention,
    "merged": merge_convolutions,
    "pixels": take_pixels,
    "early-argmax": decide_early,
}
