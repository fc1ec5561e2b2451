"""Lookups and edits in an ONNX graph that every file of this room needs. numpy; onnx inside the functions."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Graph:
    """Lookups in an ONNX graph, and edits that keep it sorted."""

    def __init__(self, proto: Any) -> None:
        self.proto, self.graph = proto, proto.graph
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the lookups after an edit."""
        self.maker = {name: node for node in self.graph.node for name in node.output if name}
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or Constant node, else None."""
        import onnx

        if name in self.constants:
            return onnx.numpy_helper.to_array(self.constants[name])
        node = self.maker.get(name)
        if node is not None and node.op_type == "Constant":
            return onnx.numpy_helper.to_array(attribute(node, "value"))
        return None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """Store an initializer under a name that is free."""
        import onnx

        while name in self.constants or name in self.maker:
            name += "_"
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, order="C"), name))
        self.constants[name] = self.graph.initializer[-1]
        return name

    def replace(self, old: Any, new: Sequence[Any]) -> None:
        """Put nodes where ``old`` stands; ``old`` goes."""
        at = next(i for i, node in enumerate(self.graph.node) if node is old or node == old)
        del self.graph.node[at]
        for offset, node in enumerate(new):
            self.graph.node.insert(at + offset, node)

    def prune(self) -> None:
        """Drop nodes and initializers nothing reads."""
        keep: set[str] = {value.name for value in self.graph.output}
        nodes = list(self.graph.node)
        alive = []
        for node in reversed(nodes):
            if any(name in keep for name in node.output):
                alive.append(node)
                keep.update(node.input)
                for inner in (a.g for a in node.attribute if a.HasField("g")):
                    keep.update(name for child in inner.node for name in child.input)
        kept = {id(node) for node in alive}
        for index in reversed([i for i, node in enumerate(nodes) if id(node) not in kept]):
            del self.graph.node[index]
        for index in reversed([i for i, t in enumerate(self.graph.initializer) if t.name not in keep]):
            del self.graph.initializer[index]
        made = {name for node in self.graph.node for name in node.output}
        for index in reversed([i for i, v in enumerate(self.graph.value_info) if v.name not in made]):
            del self.graph.value_info[index]
        self.refresh()


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    import onnx

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
