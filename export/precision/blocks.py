"""The parts of a graph that can be quantised apart: patch embedding, every transformer block, pyramid, head.

Found by what the graph computes, not by names, so files before and after graph variants are read alike: a block begins
at the normalisation in front of an attention and ends where the next one begins. Graphs without attention are cut at
the tensors their metadata name (stages), those without metadata into runs of layers.
"""

from collections.abc import Sequence
from typing import Any

from tinymim.errors import ConfigError
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.runtime.metadata import proto_metadata

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "MultiHeadAttention")
RUN = 6  # layers in a block of a graph without metadata


def blocks_of(proto: Any) -> dict[str, list[str]]:
    """Blocks of a model.

    Args:
        proto: ModelProto; nodes should be named.

    Returns:
        Name -> names of the nodes, in the order of the graph: "patch_embed", "block 1" .. for transformers, "stage 1"
        .. for other backbones, then "pyramid" and "head"; "layers 1-6" .. for graphs without metadata. Blocks without
        a layer (Conv, MatMul, ...) are left out; so are shape computations.
    """
    g = Graph(proto)
    parts = (proto_metadata(proto).get("cost") or {}).get("parts") or {}
    known = {part: [t for t in about["tensors"] if t in g.maker] for part, about in parts.items()}
    if not known.get("backbone"):
        known = {"backbone": [value.name for value in proto.graph.output]}
    ends: list[tuple[str, list[str]]] = []
    for part, tensors in known.items():
        if part == "backbone":
            ends += _backbone(g, tensors, bool(parts))
        elif part != "upsampling" and tensors:
            ends.append((part, tensors))
    taken: set[str] = set()
    blocks: dict[str, list[str]] = {}
    for name, tensors in ends:
        found = [node for node in _ancestors(g, tensors) if node.name not in taken]
        taken.update(node.name for node in found)
        if any(node.op_type in LAYERS for node in found):
            blocks[name] = [node.name for node in found]
    return blocks if parts or len(blocks) > 1 else _runs(g)


def _backbone(g: Graph, tensors: Sequence[str], staged: bool) -> list[tuple[str, list[str]]]:
    """(name, tensors it ends in) of a backbone's blocks."""
    streams = _block_inputs(g, tensors)
    if streams:
        ends = [("patch_embed", streams[:1])]
        ends += [(f"block {i}", [stream]) for i, stream in enumerate(streams[1:], 1)]
        return [*ends, (f"block {len(streams)}", list(tensors))]
    return [(f"stage {i}" if staged else "all", [name]) for i, name in enumerate(tensors, 1)]


def _block_inputs(g: Graph, tensors: Sequence[str]) -> list[str]:
    """What every transformer block reads: the input of the normalisation in front of its attention, in order."""
    order = {node.output[0]: i for i, node in enumerate(g.graph.node) if node.output}
    inside = {node.output[0] for node in _ancestors(g, tensors)}
    found: list[str] = []
    for node in g.graph.node:
        attends = node.op_type == "MultiHeadAttention" or (
            node.op_type == "Softmax" and any(u.op_type == "MatMul" for u in g.users.get(node.output[0], []))
        )
        if not attends or node.output[0] not in inside:
            continue
        norms = _nearest(g, node, "LayerNormalization")
        if norms:
            first = min(norms, key=lambda norm: order[norm.output[0]])
            if first.input[0] not in found:
                found.append(first.input[0])
    return found


def _nearest(g: Graph, node: Any, kind: str) -> list[Any]:
    """The nearest nodes of a kind on every path backwards."""
    found, stack, seen = [], list(node.input), set()
    while stack:
        name = stack.pop()
        maker = g.maker.get(name)
        if maker is None or name in seen:
            continue
        seen.add(name)
        if maker.op_type == kind:
            found.append(maker)
        else:
            stack += maker.input
    return found


def _ancestors(g: Graph, tensors: Sequence[str]) -> list[Any]:
    """Nodes that compute the tensors, in the order of the graph; paths through Shape are not followed."""
    seen: set[str] = set()
    stack = list(tensors)
    while stack:
        name = stack.pop()
        node = g.maker.get(name)
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type != "Shape":
            stack += node.input
    return [node for node in g.graph.node if node.name in seen]


def _runs(g: Graph) -> dict[str, list[str]]:
    """Runs of layers, for a graph without metadata."""
    layers = [node.name for node in g.graph.node if node.op_type in LAYERS]
    return {f"layers {i + 1}-{min(i + RUN, len(layers))}": layers[i : i + RUN] for i in range(0, len(layers), RUN)}


def choose_blocks(blocks: dict[str, list[str]], wanted: Sequence[str]) -> list[str]:
    """Names of blocks as the graph has them; "block3" and "Block 3" are understood.

    Raises:
        ConfigError: a block the graph does not have.
    """
    plain = {name.replace(" ", "").lower(): name for name in blocks}
    unknown = [name for name in wanted if name.replace(" ", "").lower() not in plain]
    if unknown:
        raise ConfigError(
            f"this file has no block {unknown[0]!r}", f"its blocks are {', '.join(blocks)}", "name one or more of them"
        )
    chosen = {plain[name.replace(" ", "").lower()] for name in wanted}
    return [name for name in blocks if name in chosen]
