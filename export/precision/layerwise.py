"""Precisions that are made layer by layer: which layers, which blocks stay in float, and why a layer stayed."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from tinymim_export.precision.base import Built, Precision
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import Target, find_targets, observed, prepare

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "MultiHeadAttention")


class LayerwisePrecision(Precision):
    """Converts the layers of its ``operators`` that have constant weights, except those of excluded blocks.

    Attributes:
        first_and_last: Whether the first and the last convolutions are converted, too: not where activations are
            quantised.
        others: Why layers of other operators stay in float.
    """

    first_and_last: ClassVar[bool] = False
    others: ClassVar[str] = "no INT8 kernel"

    def layers(self, graph: Graph) -> list[Target]:
        """The layers of a graph it can convert."""
        return find_targets(graph, self.operators, first_and_last=self.first_and_last)

    def activations(self, graph: Graph) -> list[str]:
        return observed(self.layers(graph))

    @abstractmethod
    def insert(self, graph: Graph, targets: Collection[Target], source: Any, method: str) -> None:
        """Convert some layers in place."""

    def build(self, source: Any, made: Any, excluded: Sequence[str], method: str) -> Built:
        graph = prepare(made)
        outside = {node for block in excluded for node in source.blocks[block]}
        possible = self.layers(graph)
        targets = [target for target in possible if target.node.name not in outside]
        layers = dict(Counter(target.node.op_type for target in targets))
        left = self._left(graph, {t.node.name for t in targets}, {t.node.name for t in possible})
        self.insert(graph, targets, source, method)
        return Built(layers, left)

    def _left(self, graph: Graph, done: set[str], possible: set[str]) -> dict[str, int]:
        """Why layers stay in float -> how many."""
        why: Counter[str] = Counter()
        for node in graph.graph.node:
            if node.name in done or node.op_type not in LAYERS:
                continue
            if node.name in possible:
                why["in excluded blocks"] += 1
            elif node.op_type == "MultiHeadAttention" or not any(graph.constant(n) is not None for n in node.input):
                why["products of activations (attention)"] += 1
            elif node.op_type == "MatMul":
                why["small or pooling products"] += 1
            elif node.op_type in self.operators and node.op_type == "Conv":
                why["first and last Conv"] += 1
            else:
                why[f"{node.op_type} ({self.others})"] += 1
        return dict(why)
