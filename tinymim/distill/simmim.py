"""SimMIM (arXiv 2111.09886) of a Swin, alone or distilled by D2-MAE's attention (arXiv 2404.12210).

Legend: B = batch, H, W = rows and columns, D = width, N = tokens of a window.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from tinymim.compat import is_first_process
from tinymim.distill.hierarchical import HierarchicalDistillation
from tinymim.distill.method import Method, register_method
from tinymim.distill.recipe_keys import LARGE, Key, Number
from tinymim.errors import ConfigError
from tinymim.models import swin
from tinymim.models.masked_hierarchical import Attention, SimMIM, check_family, read_swin, stored_mask_token, units
from tinymim.models.teachers import Teacher
from tinymim.models.vit import _init_weights
from tinymim.progress import say

SIMMIM_MASKING: dict[str, Key] = {
    "mask_ratio": Number(0.6, most=1, above=True, below=True),  # share of the mask units that are masked
    "mask_patch": Number(32, least=1, most=LARGE, whole=True),  # side of a mask unit, pixels
}


@register_method("simmim", verb="pretrain", title="pre-train")
class SimMIMPretraining(Method):
    """Predict masked pixels from a Swin's last stage.

    Args:
        mim: The autoencoder; its ``encoder`` is the student.
    """

    keys: ClassVar[Mapping[str, Key]] = SIMMIM_MASKING

    def __init__(self, mim: SimMIM) -> None:
        super().__init__()
        self.mim = mim
        self.student = mim.encoder

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "SimMIMPretraining":
        return cls(SimMIM(student, mask_ratio=recipe.mask_ratio, mask_patch=recipe.mask_patch))

    def losses(self, *views: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), normalised -> ``pixel`` and ``loss``, the same scalar."""
        return self.mim.losses(*views)

    @property
    def learned(self) -> nn.Module:
        """Encoder and pixel head."""
        return self.mim


class WindowQueryKey(nn.Module):
    """A Swin block cut off after its queries and keys, and the bias of its scores.

    Args:
        dim: Width D.
        heads: Attention heads.
        window: Rows and columns of a window.
        shift: Of the windows.
    """

    def __init__(self, dim: int, heads: int, window: tuple[int, int], shift: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm, self.qk = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim)
        self.qk.apply(_init_weights)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.index_NN: Tensor
        self.register_buffer("index_NN", get_relative_position_index(*window), persistent=False)

    def forward(self, x_BHWD: Tensor) -> Attention:
        qk = self.qk(swin.split_windows(self.norm(x_BHWD), self.window, self.shift))
        q, k = swin.heads_of(qk, 2, self.heads)
        bias = self.relative_position_bias_table[self.index_NN].permute(2, 0, 1)[None]
        return q.flatten(0, 1), k.flatten(0, 1), bias


def _stride(model: Any, block: int) -> int:
    """Pixels of a cell of a block's map; the further block follows the last stage."""
    return next((s.stride for s in model.stage_info if block <= s.blocks.stop), model.stage_info[-1].stride)


@register_method("d2simmim", verb="distill", title="distil")
class D2SimMIM(HierarchicalDistillation):
    """D2-MAE of a Swin student and a Swin teacher: pixels and attention decoupled.

    Pixels are decoded from an earlier stage. Attention is compared at one more block after the last, number depth + 1,
    which is a norm and the projections to queries and keys, with the windows of the teacher's block; it is dropped
    afterwards. The logits are those before the mask of shifted windows, with the bias of relative positions, as in the
    published code. A teacher whose file holds SimMIM's mask token sees the student's masked photo; any other sees the
    whole photo.

    Args:
        student: timm's ``swin_*`` as a :class:`~tinymim.models.hierarchical.Hierarchical`.
        teacher: Another one; its attribute ``mask_token``, if it has one, replaces what is masked.
        mask_ratio: Share of the mask units that are masked.
        mask_patch: Side of a mask unit, pixels.
        decode_stage: Stage (from 1) that pixels are decoded from, as the next one receives its map.
        options: See :class:`HierarchicalDistillation`; ``student_blocks`` may name depth + 1, the default.

    Attributes:
        mim: The student's autoencoder, pixel head inside.
        extra: The further block; None if no pair names it.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        **HierarchicalDistillation.common,
        **SIMMIM_MASKING,
        "decode_stage": Number(2, least=1, whole=True),  # from 1; pixels are decoded from what it hands on
    }

    def __init__(self, student: Any, teacher: Any, **options: Any) -> None:
        self.extra: WindowQueryKey | None
        super().__init__(student, teacher, **options)
        like = [swin.blocks_of(teacher)[taught - 1] for own, taught in self.pairs if own == self.last_block]
        windows = {(tuple(block.window_size), tuple(block.shift_size)) for block in like}
        if len(windows) > 1:
            raise ConfigError(
                f"block {self.last_block} of the student is compared with {len(like)} blocks of the teacher",
                "it has the windows of the teacher's block, and theirs differ",
                "name one of them in teacher_blocks",
            )
        last = student.stage_info[-1].width, swin.blocks_of(student)[-1].attn.num_heads
        self.extra = WindowQueryKey(*last, *windows.pop()) if windows else None
        for part in self._unreached():
            part.requires_grad_(False)

    def mask(  # type: ignore[override]
        self,
        student: Any,
        teacher: Any,
        *,
        mask_ratio: float = 0.6,
        mask_patch: int = 32,
        decode_stage: int | None = 2,
    ) -> SimMIM:
        check_family(teacher, "swin_", "d2simmim_swin_tiny_from_swin_small", "teacher")
        return SimMIM(student, mask_ratio=mask_ratio, mask_patch=mask_patch, decode_stage=decode_stage)

    @property
    def mim(self) -> SimMIM:
        """The student's autoencoder."""
        return self.autoencoder

    @property
    def last_block(self) -> int:
        return int(self.student.depth) + 1

    def check_pair(self, own: int, taught: int) -> tuple[int, int]:
        blocks = swin.blocks_of(self.student)
        mine, theirs = blocks[min(own, len(blocks)) - 1], swin.blocks_of(self.teacher)[taught - 1]
        seen = [
            (_stride(model, block), tuple(each.window_size), tuple(each.shift_size))
            for model, block, each in ((self.student, own, mine), (self.teacher, taught, theirs))
        ]
        if own > len(blocks):  # has the windows of the teacher's block
            seen[0] = (seen[0][0], *seen[1][1:])
        if seen[0] != seen[1]:
            words = [
                f"block {block} of the {side}: stride {stride}, windows of {window}, shifted by {shift}"
                for (stride, window, shift), block, side in zip(
                    seen, (own, taught), ("student", "teacher"), strict=True
                )
            ]
            raise ConfigError(
                f"block {own} of the student cannot be compared with block {taught} of the teacher",
                "; ".join(words),
                "choose student_blocks and teacher_blocks of the same stage and windows, both at odd or both at even "
                "places in it; leave them out for the last ones",
            )
        return mine.attn.num_heads, theirs.attn.num_heads

    def _unreached(self) -> list[Any]:
        """Parts of the student that neither loss depends on: what follows the deepest block that is compared."""
        if self.extra is not None or self.mim.at_end:
            return []
        deepest, parts = max(own for own, _ in self.pairs), []
        for i, (stage, info) in enumerate(zip(self.student.layers, self.student.stage_info, strict=True)):
            if i > self.mim.entered and info.blocks.start >= deepest:
                parts.append(stage)
            elif i >= self.mim.entered:
                for number, block in enumerate(stage.blocks, info.blocks.start + 1):
                    parts += [block.attn.proj, block.norm2, block.mlp] if number == deepest else []
                    parts += [block] if number > deepest else []
        return parts

    @classmethod
    def ready(cls, teacher: Teacher, recipe: Any) -> Any:
        model: Any = teacher.model
        check_family(model, "swin_", "d2simmim_swin_tiny_from_swin_small", "teacher")
        file = recipe.teacher_weights or recipe.teacher
        token = stored_mask_token(file, model) if Path(file).exists() else None
        if token is not None:
            model.register_parameter("mask_token", nn.Parameter(token, requires_grad=False))
        elif is_first_process():
            say(f"note: {teacher.name} has no mask token (SimMIM's files have one): it sees the whole photo")
        return model

    @property
    def learned(self) -> nn.Module:
        """The autoencoder, the maps and the further block."""
        parts = {"network": self.autoencoder, "head_maps": self.head_maps}
        return nn.ModuleDict(parts | ({} if self.extra is None else {"extra": self.extra}))

    def read_student(self, images: Tensor, order_BU: Tensor) -> tuple[Tensor, list[Attention]]:
        loss, found, last_BHWD = self.mim.read(images, order_BU, {own for own, _ in self.pairs})
        if self.extra is not None:
            found[self.last_block] = self.extra(last_BHWD)
        return loss, [found[own] for own, _ in self.pairs]

    def read_teacher(self, images: Tensor, order_BU: Tensor) -> list[Attention]:
        masked = None
        if getattr(self.teacher, "mask_token", None) is not None:
            masked = self.mim.masked(order_BU, units(images.shape[-2:], self.mim.unit))
        found, _ = read_swin(self.teacher, images, {taught for _, taught in self.pairs}, masked, whole=False)
        return [found[taught] for _, taught in self.pairs]
