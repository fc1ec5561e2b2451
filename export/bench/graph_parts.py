"""A graph cut into its parts at named tensors, on the bytes of the .onnx file: the package onnx is not needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinymim_export.runtime.metadata import not_onnx
from tinymim_export.runtime.wire import NotProtobuf, fields, wire_field

IR_VERSION, OPSETS, GRAPH, FUNCTIONS = 1, 8, 7, 25  # fields of ModelProto
NODE, NAME, INITIALIZER, INPUT, OUTPUT = 1, 2, 5, 11, 12  # of GraphProto
NODE_INPUT, NODE_OUTPUT, TENSOR_NAME, VALUE_NAME, VALUE_TYPE = 1, 2, 8, 1, 2
TYPES = {  # numpy -> TensorProto.DataType
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
}


@dataclass
class Node:
    """One operator."""

    raw: bytes
    inputs: list[str]
    outputs: list[str]


@dataclass
class Piece:
    """One part of a graph.

    Attributes:
        name: The part.
        inputs: The image and the tensors that earlier parts give.
        outputs: What later parts and the file itself give on.
    """

    name: str
    head: bytes  # IR version, operator sets, functions of the whole model
    nodes: list[Node] = field(default_factory=list)
    initializers: list[bytes] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def model(self, known: dict[str, np.ndarray]) -> bytes:
        """The part as a .onnx file; ``known`` has an array for every input, whose type and shape are written."""
        graph = b"".join(wire_field(NODE, node.raw) for node in self.nodes) + wire_field(NAME, self.name)
        graph += b"".join(wire_field(INITIALIZER, tensor) for tensor in self.initializers)
        graph += b"".join(wire_field(INPUT, _value(name, known[name])) for name in self.inputs)
        graph += b"".join(wire_field(OUTPUT, wire_field(VALUE_NAME, name)) for name in self.outputs)
        return self.head + wire_field(GRAPH, graph)


def cut(model: bytes, parts: dict[str, Sequence[str]]) -> dict[str, Piece]:
    """Split a graph; every node is in exactly one part.

    Args:
        model: Content of the .onnx file.
        parts: Part -> names of its output tensors, in the order of the graph.

    Returns:
        Part -> piece; parts without nodes (a pyramid that passes tensors through) are left out.

    Raises:
        DataError: it is no .onnx file.
    """
    try:
        content = [
            (number, value) for number, value in fields(model) if number in (IR_VERSION, OPSETS, GRAPH, FUNCTIONS)
        ]
        graph = [item for number, value in content if number == GRAPH for item in fields(_bytes(value))]
        nodes = [_node(_bytes(raw)) for number, raw in graph if number == NODE]
        initializers = {
            _text(_bytes(raw), TENSOR_NAME)[0]: _bytes(raw) for number, raw in graph if number == INITIALIZER
        }
        given = [_text(_bytes(raw), VALUE_NAME)[0] for number, raw in graph if number == INPUT]
    except (NotProtobuf, IndexError, UnicodeDecodeError) as error:
        raise not_onnx("the file", error) from error
    head = b"".join(wire_field(number, value) for number, value in content if number != GRAPH)
    makers = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    owner: dict[int, str] = {}
    for part, tensors in parts.items():
        stack = list(tensors)
        while stack:
            index = makers.get(stack.pop())
            if index is not None and index not in owner:
                owner[index] = part
                stack += nodes[index].inputs
    crossing = {
        name
        for index, part in owner.items()
        for name in nodes[index].inputs
        if name in makers and owner[makers[name]] != part
    }
    crossing |= {name for tensors in parts.values() for name in tensors}
    pieces = {}
    for part in parts:
        piece = Piece(part, head, [nodes[index] for index in sorted(owner) if owner[index] == part])
        made = {name for node in piece.nodes for name in node.outputs}
        read = {name for node in piece.nodes for name in node.inputs} - made
        piece.initializers = [raw for name, raw in initializers.items() if name in read]
        piece.inputs = sorted(name for name in read if name in makers or name in given)
        piece.outputs = sorted(made & crossing)
        if piece.nodes:
            pieces[part] = piece
    return pieces


def _node(raw: bytes) -> Node:
    return Node(raw, _text(raw, NODE_INPUT), _text(raw, NODE_OUTPUT))


def _text(message: bytes, number: int) -> list[str]:
    """The strings of a field."""
    return [_bytes(value).decode() for found, value in fields(message) if found == number]


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise NotProtobuf("a number in place of a message")
    return value


def _value(name: str, array: np.ndarray) -> bytes:
    """A ValueInfoProto."""
    shape = b"".join(wire_field(1, wire_field(1, int(side))) for side in array.shape)
    tensor = wire_field(1, TYPES[str(array.dtype)]) + wire_field(2, shape)
    return wire_field(VALUE_NAME, name) + wire_field(VALUE_TYPE, wire_field(1, tensor))
