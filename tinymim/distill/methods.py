"""Distillation methods: a student, a frozen teacher, and a dict of named losses.

Legend: B = batch, T = tokens, D = width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tinymim.distill.relations import relation_losses
from tinymim.distill.taps import TAPPABLE, num_heads, num_prefix, patch_grid, qkv_at
from tinymim.errors import ConfigError
from tinymim.models.vit import ViT


class TinyMIM(nn.Module):
    """Token-relation distillation, the published default (arXiv 2301.01296, equation 9): Q-K + V-V, KL.

    The teacher is frozen, in evaluation mode, and stops inside its target block. The student is read in its last
    block; what lies behind that block's q, k, v is never computed and needs no gradient, nor do its fixed positions.

    Args:
        student: Our ViT.
        teacher: Our ViT, or timm's VisionTransformer or BEiT, with the student's patch size.
        target_block: Teacher block, 1-based; None: 18 of 24, else the last.
        relation_heads: Groups the channels of both sides are split into; None: the teacher's heads.

    Raises:
        ConfigError: unknown model class, other patch size or prefix tokens, no such block, or heads that do not
            divide both widths.
    """

    def __init__(
        self, student: ViT, teacher: Any, *, target_block: int | None = None, relation_heads: int | None = None
    ) -> None:
        super().__init__()
        for side, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, TAPPABLE):
                raise ConfigError(
                    f"the {side} is a {type(model).__name__}",
                    "relations are read from tinymim's ViT and timm's VisionTransformer and BEiT",
                    f"use one of these as {side}",
                )
        depth = len(teacher.blocks)
        self.target_block = target_block or (18 if depth == 24 else depth)
        if not 1 <= self.target_block <= depth:
            raise ConfigError(
                f"target_block={target_block} leaves the teacher",
                f"it has {depth} blocks, counted from 1",
                f"choose 1 to {depth}",
            )
        self.relation_heads = relation_heads or num_heads(teacher)
        widths = (student.embed_dim, int(teacher.embed_dim))
        if any(width % self.relation_heads for width in widths):
            raise ConfigError(
                f"{self.relation_heads} relation heads do not divide the widths {widths[0]} and {widths[1]}",
                "channels of both sides are regrouped into that many heads",
                "choose relation_heads that divides both",
            )
        probe = (224, 224)
        grids = patch_grid(student, probe), patch_grid(teacher, probe)
        if grids[0] != grids[1]:
            raise ConfigError(
                f"student and teacher cut a {probe[0]}-pixel photo into {grids[0]} and {grids[1]} patches",
                "a relation pairs tokens one to one, so both need the same patch size",
                f"choose a teacher with patch {student.patch_size}",
            )
        if num_prefix(student) != num_prefix(teacher):
            raise ConfigError(
                f"the student has {num_prefix(student)} prefix tokens, the teacher {num_prefix(teacher)}",
                "the class token takes part in the relation, so both sides need the same tokens",
                "use a student without distillation token (fine-tuning adds it: new_dist_token=True)",
            )
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        last: Any = student.blocks[-1]
        unused = (last.attn.proj, last.ls1, last.norm2, last.mlp, last.ls2, student.norm, student.conv1x1)
        for module in unused:
            module.requires_grad_(False)
        if last.attn.relative_position_bias_table is not None:
            last.attn.relative_position_bias_table.requires_grad_(False)
        student.pos_embed.requires_grad_(False)

    def train(self, mode: bool = True) -> "TinyMIM":
        """Training mode for the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(self, student_images: Tensor, teacher_images: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_images: (B, 3, H, W), normalised.
            teacher_images: The same crops, (B, 3, H, W), normalised the teacher's way.

        Returns:
            ``qk``, ``vv`` and ``loss`` (their sum), differentiable scalars.
        """
        with torch.no_grad():
            teacher = qkv_at(self.teacher, teacher_images, self.target_block)
        student = qkv_at(self.student, student_images, self.student.depth)
        parts = relation_losses(student, teacher, self.relation_heads)
        return {**parts, "loss": parts["qk"] + parts["vv"]}

    def forward(self, student_images: Tensor, teacher_images: Tensor) -> dict[str, Tensor]:
        """Same as :meth:`losses` (what DistributedDataParallel calls)."""
        return self.losses(student_images, teacher_images)
