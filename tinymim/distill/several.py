"""One student, several teachers at once: the weighted sum of their losses, with one forward pass of the student."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.distill.freeze import freeze_unreached
from tinymim.distill.method import Method
from tinymim.distill.taps import read
from tinymim.errors import ConfigError


class SeveralTeachers(Method):
    """Several methods with the same student, one teacher each.

    Every teacher has its own targets, blocks, relation heads and patch alignment; all share one mask, so that the
    student is run once.

    Args:
        methods: :class:`~tinymim.distill.tinymim.TinyMIM` objects with the same student object; only the first may have
            MAE's pixel loss.
        weights: Weight of each method's loss; None: 1 each.

    Raises:
        ConfigError: no methods, different students or masks, a pixel loss in a later method, or weights that do not
            fit.
    """

    def __init__(self, methods: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(methods) if weights is None else [float(weight) for weight in weights]
        if not methods or len(weights) != len(methods) or min(weights) <= 0:
            raise ConfigError(
                f"{len(methods)} teachers with the weights {weights}",
                "each teacher needs a weight above 0",
                "give one weight per teacher",
            )
        first = methods[0]
        if any(
            m.student is not first.student
            or (m.mask, m.mask_ratio) != (first.mask, first.mask_ratio)
            or m.mae is not None
            for m in methods[1:]
        ):
            raise ConfigError(
                "the teachers' methods do not fit together",
                "the student is run once for all of them",
                "give all of them the same student and mask, and reconstruct to the first only",
            )
        self.methods, self.weights = nn.ModuleList(methods), weights
        self.student, self.mae = first.student, first.mae
        self.teachers = [teacher for method in methods for teacher in method.teachers]
        self.calibrates = any(method.calibrates for method in methods)
        self.per_photo = self._per_photo if any(method.per_photo for method in methods) else None
        self.taps: dict[int, tuple[str, ...]] = {}
        for method in methods:
            for block, names in method.student_taps().items():
                self.taps[block] = tuple(dict.fromkeys((*self.taps.get(block, ()), *names)))
        freeze_unreached(self.student, self.taps, pixels=self.mae is not None)

    def _per_photo(self, photo: Path, epoch: int) -> dict[str, Tensor]:
        """The tensors that all sources need for a photo; their names must differ."""
        wanted = [method.per_photo for method in self.methods if method.per_photo]
        return {name: value for of in wanted for name, value in of(photo, epoch).items()}  # type: ignore[operator]

    def prepare(self, dtype: torch.dtype) -> None:
        for method in self.methods:
            method.prepare(dtype)  # type: ignore[operator]

    def calibrate(self, dtype: torch.dtype, *views: Tensor) -> None:
        for method, images in zip(self.methods, views[1:], strict=True):
            if method.calibrates:
                method.calibrate(dtype, views[0], images)  # type: ignore[operator]

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume, the student's tensors once."""
        maps = nn.ModuleList(method.maps for method in self.methods)  # type: ignore[misc]
        return nn.ModuleDict({"network": self.mae or self.student, "maps": maps})

    def losses(self, *views: Tensor, extra: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            views: The student's images (B, 3, H, W), normalised, and the same crops for each teacher, normalised for
                it.
            extra: The stacked tensors of :attr:`per_photo`.

        Returns:
            The losses of each method, with the teacher's number before the name (``t1_qk``), and ``loss``.
        """
        first: Any = self.methods[0]
        order_BN = first.order(views[0])
        learned = read(self.student, views[0], self.taps, first.visible(order_BN, "student"))
        out: dict[str, Tensor] = {}
        parts = []
        for i, (method, images) in enumerate(zip(self.methods, views[1:], strict=True)):
            found = method.compare(views[0], images, learned, order_BN, extra)  # type: ignore[operator]
            parts.append(self.weights[i] * found.pop("loss"))
            out |= {f"t{i + 1}_{name}": loss for name, loss in found.items()}
        return {**out, "loss": sum(parts[1:], parts[0])}

    def relation_pairs(self, views: Sequence[Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
        for i, (method, images) in enumerate(zip(self.methods, views[1:], strict=True)):
            yield f"t{i + 1}_", method, images

    def learned_relations(self) -> tuple[int, int] | None:
        """As for one teacher if all agree, else None."""
        found = {method.learned_relations() for method in self.methods} - {None}  # type: ignore[operator]
        return found.pop() if len(found) == 1 else None
