"""One student, several teachers at once: the weighted sum of their losses, the student run once."""

from collections.abc import Sequence

from torch import Tensor, nn

from tinymim.distill.freeze import freeze_unreached
from tinymim.distill.methods import TinyMIM
from tinymim.distill.taps import read
from tinymim.errors import ConfigError


class SeveralTeachers(nn.Module):
    """Methods of one student, a teacher each.

    Every teacher has its own targets, blocks, relation heads and way to align its patches; all share one mask, so that
    the student is run once.

    Args:
        methods: The methods, all of the same student object; MAE's pixel loss belongs to the first.
        weights: Of their losses.

    Raises:
        ConfigError: no methods, other students or masks, a pixel loss in a later method, or weights that do not fit.
    """

    def __init__(self, methods: Sequence[TinyMIM], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(methods) if weights is None else [float(weight) for weight in weights]
        if not methods or len(weights) != len(methods) or min(weights) <= 0:
            raise ConfigError(
                f"{len(methods)} teachers with the weights {weights}",
                "each teacher has a weight above 0",
                "give one weight a teacher",
            )
        first = methods[0]
        if any(
            m.student is not first.student
            or (m.mask, m.mask_ratio) != (first.mask, first.mask_ratio)
            or m.mae is not None
            for m in methods[1:]
        ):
            raise ConfigError(
                "the teachers' methods do not go together",
                "the student is run once for all of them",
                "give all the same student and mask, and reconstruct to the first only",
            )
        self.methods, self.weights = nn.ModuleList(methods), weights
        self.student, self.mae = first.student, first.mae
        self.taps: dict[int, tuple[str, ...]] = {}
        for method in methods:
            for block, names in method.student_taps().items():
                self.taps[block] = tuple(dict.fromkeys((*self.taps.get(block, ()), *names)))
        freeze_unreached(self.student, self.taps, pixels=self.mae is not None)

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to go on, the student's tensors once."""
        maps = nn.ModuleList(method.maps for method in self.methods)  # type: ignore[misc]
        return nn.ModuleDict({"network": self.mae or self.student, "maps": maps})

    def losses(self, student_images: Tensor, *teacher_images: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_images: (B, 3, H, W), normalised.
            teacher_images: The same crops for each teacher, normalised its way.

        Returns:
            What :meth:`TinyMIM.losses` returns, each name after its teacher's number (``t1_qk``), and ``loss``.
        """
        first: TinyMIM = self.methods[0]  # type: ignore[assignment]
        order_BN = first.order(student_images)
        learned = read(self.student, student_images, self.taps, first.visible(order_BN, "student"))
        out: dict[str, Tensor] = {}
        parts = []
        for i, (method, images) in enumerate(zip(self.methods, teacher_images, strict=True)):
            found = method.compare(student_images, images, learned, order_BN)  # type: ignore[operator]
            parts.append(self.weights[i] * found.pop("loss"))
            out |= {f"t{i + 1}_{name}": loss for name, loss in found.items()}
        return {**out, "loss": sum(parts[1:], parts[0])}

    def forward(self, student_images: Tensor, *teacher_images: Tensor) -> dict[str, Tensor]:
        """Same as :meth:`losses` (what DistributedDataParallel calls)."""
        return self.losses(student_images, *teacher_images)
