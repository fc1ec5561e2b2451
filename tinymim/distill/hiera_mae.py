"""Hiera's masked autoencoder (arXiv 2306.00989), alone or distilled by D-MAE's attention (arXiv 2404.12210)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tinymim.distill.hierarchical import HierarchicalDistillation
from tinymim.distill.mae import MASKING, decoder_arguments
from tinymim.distill.method import Method, register_method
from tinymim.distill.recipe_keys import Key, Number
from tinymim.errors import ConfigError
from tinymim.models import hiera
from tinymim.models.masked_hierarchical import Attention, HieraMAE, check_family

HIERA_MASKING: dict[str, Key] = {
    **MASKING,
    "mask_ratio": Number(0.6, most=1, above=True, below=True),  # share of the mask units, 32 pixels, that are masked
    "q_pool": Number(2, whole=True),  # stages that begin by pooling during pre-training; the encoder keeps its own
}


@register_method("hiera_mae", verb="pretrain", title="pre-train")
class HieraPretraining(Method):
    """Predict the pixels of masked mask units from the visible ones.

    Args:
        mae: The autoencoder; its ``encoder`` is the student.
    """

    keys: ClassVar[Mapping[str, Key]] = HIERA_MASKING

    def __init__(self, mae: HieraMAE) -> None:
        super().__init__()
        self.mae = mae
        self.student = mae.encoder

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "HieraPretraining":
        masking = dict(mask_ratio=recipe.mask_ratio, q_pool=recipe.q_pool)
        return cls(HieraMAE(student, **masking, **decoder_arguments(recipe)))

    def losses(self, *views: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), normalised -> ``pixel`` and ``loss``, the same scalar."""
        return self.mae.losses(*views)

    @property
    def learned(self) -> nn.Module:
        """Encoder and decoder."""
        return self.mae


@register_method("hiera_dmae", verb="distill", title="distil")
class HieraDMAE(HierarchicalDistillation):
    """D-MAE of a Hiera student and a Hiera teacher, which see the same mask units.

    Blocks may be named that see the same tokens: of the same stage, both windowed or both global, both pooling or not.

    Args:
        student: timm's ``hiera_*`` as a :class:`~tinymim.models.hierarchical.Hierarchical`.
        teacher: Another one, with mask units of the same size.
        mask_ratio: Share of the mask units that are masked (0.4 in the paper's code, 0.6 in Hiera's).
        norm_pix: Normalise every target patch.
        decoder: ``dim``, ``depth`` and ``heads`` of the decoder.
        q_pool: See :class:`~tinymim.models.masked_hierarchical.HieraMAE`; of both models.
        options: See :class:`HierarchicalDistillation`.

    Attributes:
        mae: The student's masked autoencoder, decoder inside.
    """

    keys: ClassVar[Mapping[str, Key]] = {**HierarchicalDistillation.common, **HIERA_MASKING}

    def mask(  # type: ignore[override]
        self,
        student: Any,
        teacher: Any,
        *,
        mask_ratio: float = 0.4,
        norm_pix: bool = True,
        decoder: Mapping[str, int] | None = None,
        q_pool: int = 2,
    ) -> HieraMAE:
        d = {"dim": 96, "depth": 1, "heads": 3, **(decoder or {})}
        mae = HieraMAE(
            student,
            decoder_dim=d["dim"],
            decoder_depth=d["depth"],
            decoder_heads=d["heads"],
            mask_ratio=mask_ratio,
            norm_pix=norm_pix,
            q_pool=q_pool,
        )
        check_family(teacher, "hiera_", "hiera_tiny_from_hiera_base", "teacher")
        own, taught = hiera.unit_side(student), hiera.unit_side(teacher)
        if own != taught or len(teacher.stage_info) != len(student.stage_info):
            raise ConfigError(
                f"mask units of {own} pixels and {len(student.stage_info)} stages in the student, {taught} and "
                f"{len(teacher.stage_info)} in the teacher",
                "both see the same mask units, on the same grids",
                "use timm's mask units and four stages on both sides",
            )
        return mae

    @property
    def mae(self) -> HieraMAE:
        """The student's masked autoencoder."""
        return self.autoencoder

    def check_pair(self, own: int, taught: int) -> tuple[int, int]:
        models = (self.student, own, "student"), (self.teacher, taught, "teacher")
        seen = [hiera.tokens_seen(model, block, self.mae.q_pool) for model, block, _ in models]
        if seen[0] != seen[1]:
            words = [
                f"block {block} of the {side}: {q} queries and {k} keys of a mask unit, attention "
                f"{'within windows' if windowed else 'of the whole photo'}"
                for (_, block, side), (q, k, windowed) in zip(models, seen, strict=True)
            ]
            others = range(1, self.teacher.depth + 1)
            fits = [i for i in others if hiera.tokens_seen(self.teacher, i, self.mae.q_pool) == seen[0]]
            raise ConfigError(
                f"block {own} of the student cannot be compared with block {taught} of the teacher",
                "; ".join(words),
                f"choose teacher_blocks from {', '.join(map(str, fits))}" if fits else "choose other student_blocks",
            )
        return self.student.blocks[own - 1].attn.heads, self.teacher.blocks[taught - 1].attn.heads

    def read_student(self, images: Tensor, order_BU: Tensor) -> tuple[Tensor, list[Attention]]:
        loss, found = self.mae.read(images, order_BU, {own for own, _ in self.pairs})
        return loss, [found[own] for own, _ in self.pairs]

    def read_teacher(self, images: Tensor, order_BU: Tensor) -> list[Attention]:
        wanted = {taught for _, taught in self.pairs}
        keep_BV = self.mae.visible(order_BU)
        _, found = hiera.run_masked(self.teacher, images, keep_BV, self.mae.q_pool, wanted, whole=False)
        return [found[taught] for _, taught in self.pairs]
