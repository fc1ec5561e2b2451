"""What a precision is, and the registry. A precision is the number format of a file: fp32, fp16, int8 and others.

A precision is a subclass of :class:`Precision` in a file of its own: its name, what it converts, how close a file must
stay to the FP32 file, where it can pay, and :meth:`Precision.build`. Light: the command line and the reports read it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

from tinymim.errors import ConfigError


class Tolerance(NamedTuple):
    """What a file of a precision must reach against the FP32 file."""

    cosine: float
    equal_pixels: float  # share, 0 to 1


@dataclass(frozen=True)
class Built:
    """What :meth:`Precision.build` did."""

    layers: dict[str, int] = field(default_factory=dict)  # operator -> layers converted
    left: dict[str, int] = field(default_factory=dict)  # why a layer stayed in float -> how many
    notes: Sequence[str] = ()  # sentences


class Precision(ABC):
    """One number format that a file can be written in.

    Attributes:
        name: Word of ``--precision``, and what the file's metadata say.
        title: Its name in sentences.
        about: What it changes, in one line.
        tolerance: What a file must reach against the FP32 file it was made from.
        targets: "runtime provider" of those it can be faster on; ``--tune`` tries it there.
        operators: Those whose layers it converts one by one, so that blocks can be left in float; empty: it converts
            the graph as a whole.
        without: Graph variants that take away what it converts; ``--tune`` leaves them out.
        needs_calibration: Whether photos have to show the ranges of the activations beforehand.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    tolerance: Tolerance
    targets: ClassVar[tuple[str, ...]] = ()
    operators: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False

    def activations(self, graph: Any) -> list[str]:
        """Tensors of a prepared :class:`~tinymim_export.precision.onnx_graph.Graph` whose ranges it needs."""
        from tinymim_export.precision.qdq import find_targets, observed

        return observed(find_targets(graph, self.operators))

    @abstractmethod
    def build(self, source: Any, made: Any, excluded: Sequence[str], method: str) -> Built:
        """Convert ``made`` in place.

        Args:
            source: The opened :class:`~tinymim_export.precision.float_file.FloatFile`: its blocks, and the ranges
                measured for it.
            made: A copy of its ModelProto, graph variants applied.
            excluded: Blocks to leave in float.
            method: How a range is read off its histogram: "percentile", "entropy" or "minmax".
        """


PRECISIONS: dict[str, Precision] = {}  # word of --precision -> precision, in the order of registration
PrecisionClass = TypeVar("PrecisionClass", bound=type[Precision])


def register_precision(precision: PrecisionClass) -> PrecisionClass:
    """Class decorator: the precision becomes a choice of ``--precision`` and a candidate of ``--tune``.

    Raises:
        ConfigError: the name is taken.
    """
    if precision.name in PRECISIONS:
        raise ConfigError(
            f"precision {precision.name!r} is registered already",
            f"by {type(PRECISIONS[precision.name])}",
            "choose another name",
        )
    PRECISIONS[precision.name] = precision()
    return precision


def find_precision(name: str) -> Precision:
    """A precision by its word.

    Raises:
        ConfigError: unknown.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} is unknown", f"known: {', '.join(PRECISIONS)}", "choose one of them")
    return PRECISIONS[name]


def by_block(name: str | None) -> bool:
    """Whether a precision is made layer by layer, so that blocks can be left in float; False for an unknown one."""
    return name in PRECISIONS and bool(PRECISIONS[name].operators)
