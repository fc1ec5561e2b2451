"""Random numbers that follow a photo's place in the global batch, not the process or the pass that it happens to be in.

Drop path and masks draw for the whole global batch and keep the rows at hand. So any number of processes and any size
of a pass give the same numbers as one process that takes the batch at once. Outside :func:`rows_of` they draw as usual.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """The rows at hand.

    Attributes:
        first: Place of the first one in the batch.
        count: Their number.
        total: Rows of the whole batch.
    """

    first: int
    count: int
    total: int


_rows: Rows | None = None


@contextmanager
def rows_of(first: int, count: int, total: int) -> Iterator[None]:
    """Inside the block a pass sees rows ``first`` .. ``first + count - 1`` of a batch of ``total``."""
    global _rows
    before, _rows = _rows, None if count == total else Rows(first, count, total)
    try:
        yield
    finally:
        _rows = before


def draw_rows(sample: Callable[[int], Tensor], count: int) -> Tensor:
    """``sample(count)``, or these rows of ``sample`` for the whole batch.

    Args:
        sample: Number of rows n -> random tensor (n, ...).
        count: Rows of this pass, or a multiple (the windows of each image).
    """
    if _rows is None or count % _rows.count:
        return sample(count)
    each = count // _rows.count
    return sample(_rows.total * each)[_rows.first * each :][:count]


def draw_orders(count: int, patches: int, device: Any) -> Tensor:
    """A random order of the patches for each image, (count, patches), drawn by :func:`draw_rows`."""
    return draw_rows(lambda n: torch.rand(n, patches, device=device), count).argsort(dim=1)


class DropPath(timm.layers.DropPath):
    """timm's stochastic depth per image, drawn by :func:`draw_rows`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        kept = draw_rows(lambda n: x.new_empty((n, *[1] * (x.ndim - 1))).bernoulli_(keep), len(x))
        return x * (kept.div_(keep) if keep > 0 and self.scale_by_keep else kept)


def draw_by_rows(model: nn.Module) -> None:
    """Replace timm's drop path by :class:`DropPath` in all modules of a model."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is timm.layers.DropPath:
                setattr(module, name, DropPath(child.drop_prob, child.scale_by_keep))
