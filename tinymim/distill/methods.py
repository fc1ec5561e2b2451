"""Distillation methods: a student, a frozen teacher, and a dict of named losses.

Legend: B = batch, T = tokens, N = patches, V = visible patches, D = width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from tinymim.distill.checks import check_models, check_options
from tinymim.distill.features import class_token_kl, feature_loss
from tinymim.distill.freeze import freeze_unreached
from tinymim.distill.relations import relation_losses
from tinymim.distill.taps import read
from tinymim.distill.targets import Target, parse_target
from tinymim.errors import ConfigError
from tinymim.models.mae import MAE, keep_patches
from tinymim.models.tokens import (
    has_class_token,
    num_heads,
    pair_tokens,
    patch_grid,
    patch_size,
    resample,
)
from tinymim.models.vit import ViT


class TinyMIM(nn.Module):
    """Distillation as TinyMIM studies it (arXiv 2301.01296); the defaults are its winner: relations Q-K + V-V, KL.

    The teacher is frozen, in evaluation mode, and stops inside its deepest target block. The student is read up to its
    deepest; what lies behind is never computed and needs no gradient, nor do its fixed positions.

    Args:
        student: Our ViT.
        teacher: Our ViT, or one of timm's (:data:`tinymim.distill.taps.TAPPABLE`).
        targets: Words of :mod:`tinymim.distill.targets`, several for several pairs of blocks at once.
        target_block: Teacher block of words that name none, 1-based; None: 18 of 24, else the last.
        relation_heads: Groups the channels of both sides are split into; None: the teacher's heads.
        softmax: False compares scaled scores (:func:`tinymim.distill.relations.relation_smooth_l1`).
        class_token: Whether it takes part in relations and features; None: where both sides have one.
        mask: Who sees only the visible patches: None, "student", "teacher" or "both". The paper does not say what its
            masked rows (table 12) hide from whom. Here a masked side encodes the visible patches alone, the other one
            all of them, and tokens are compared where both have one.
        mask_ratio: Share of the patches hidden.
        reconstruct: Add MAE's loss on the hidden pixels; keywords of :class:`tinymim.models.mae.MAE` for its decoder,
            with a ``weight``. Needs a masked student.
        teacher_drop_path: Stochastic depth of the teacher's blocks, constant (table 13); 0: none.
        align: For patch grids that differ: "image" resizes the teacher's photo until its grid is the student's,
            "tokens" resamples the teacher's tokens (bilinear; its photo is first resized up to whole patches).

    Raises:
        ConfigError: unknown model class or word, other patch size without ``align``, no such block, or heads that do
            not divide both widths.
    """

    def __init__(
        self,
        student: ViT,
        teacher: Any,
        *,
        targets: Sequence[str] = ("qk+vv",),
        target_block: int | None = None,
        relation_heads: int | None = None,
        softmax: bool = True,
        class_token: bool | None = None,
        mask: str | None = None,
        mask_ratio: float = 0.75,
        reconstruct: dict[str, Any] | None = None,
        teacher_drop_path: float = 0.0,
        align: str | None = None,
    ) -> None:
        super().__init__()
        check_models(student, teacher)
        depths = len(teacher.blocks), student.depth
        words = [targets] if isinstance(targets, str) else targets
        self.targets = [parse_target(word, *depths, target_block) for word in words]
        if not self.targets:
            raise ConfigError("no targets", "nothing would be learned", "e.g. targets=('qk+vv',)")
        self.target_block = self.targets[0].teacher_block
        self.softmax, self.mask, self.mask_ratio, self.align = softmax, mask, mask_ratio, align
        self.relation_heads = relation_heads or num_heads(teacher)
        check_options(self, student, teacher, class_token, reconstruct)
        both = has_class_token(student) and has_class_token(teacher)
        self.class_token = both if class_token is None else class_token
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher_drops = _add_drop_path(teacher, teacher_drop_path)
        widths = student.embed_dim, int(teacher.embed_dim)
        self.maps = nn.ModuleDict(
            {
                f"{i}_{part}": nn.Linear(*widths)
                for i, target in enumerate(self.targets)
                for part in target.parts
                if target.kind == "feature" or (target.kind == "class_token" and widths[0] != widths[1])
            }
        )
        options = dict(reconstruct or {})
        self.reconstruct_weight = float(options.pop("weight", 1.0))
        self.mae = MAE(student, mask_ratio=mask_ratio, **options) if reconstruct is not None else None
        freeze_unreached(student, self.student_taps(), pixels=self.mae is not None)

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to go on, the student's tensors once."""
        if not self.maps and self.mae is None:
            return self.student
        return nn.ModuleDict({"network": self.mae or self.student, "maps": self.maps})

    def train(self, mode: bool = True) -> "TinyMIM":
        """Training mode for the student; the teacher stays in evaluation mode, but for its drop path if asked for."""
        super().train(mode)
        self.teacher.eval()
        for drop in self.teacher_drops:
            drop.train(mode)
        return self

    def losses(self, student_images: Tensor, teacher_images: Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_images: (B, 3, H, W), normalised.
            teacher_images: The same crops, (B, 3, H, W), normalised the teacher's way.

        Returns:
            A differentiable scalar a relation or feature (``qk``, ``vv``; with several pairs of blocks ``qk@18:12``),
            ``pixel`` with ``reconstruct``, and their weighted sum ``loss``.
        """
        order_BN = self.order(student_images)
        learned = read(self.student, student_images, self.student_taps(), self.visible(order_BN, "student"))
        return self.compare(student_images, teacher_images, learned, order_BN)

    def compare(
        self,
        student_images: Tensor,
        teacher_images: Tensor,
        learned: dict[int, dict[str, Tensor]],
        order_BN: Tensor | None,
    ) -> dict[str, Tensor]:
        """:meth:`losses` of a student that has been read at :meth:`student_taps`."""
        grid = patch_grid(self.student, (student_images.shape[2], student_images.shape[3]))
        keep_BV = self.visible(order_BN)
        teacher_images = self.fit(teacher_images, grid)
        with torch.no_grad():
            taught = read(self.teacher, teacher_images, self._wanted("teacher"), self.visible(order_BN, "teacher"))
        losses: dict[str, Tensor] = {}
        total: Tensor | None = None
        for i, target in enumerate(self.targets):
            s = self._tokens(learned[target.student_block], target, "student", keep_BV, grid)
            t = self._tokens(taught[target.teacher_block], target, "teacher", keep_BV, grid)
            for name, loss in self._compare(i, target, s, t).items():
                losses[self.loss_name(target, name)] = loss
                total = target.weight * loss if total is None else total + target.weight * loss
        assert total is not None
        if self.mae is not None:
            assert order_BN is not None
            tokens = self.student.norm(learned[self.student.depth]["output"])
            losses["pixel"] = self.mae.pixel_loss(student_images, tokens, order_BN)
            total = total + self.reconstruct_weight * losses["pixel"]
        return {**losses, "loss": total}

    def forward(self, student_images: Tensor, teacher_images: Tensor) -> dict[str, Tensor]:
        """Same as :meth:`losses` (what DistributedDataParallel calls)."""
        return self.losses(student_images, teacher_images)

    def order(self, student_images: Tensor) -> Tensor | None:
        """A permutation of the patches an image (B, N), the first ones visible; None without a mask."""
        if self.mask is None:
            return None
        grid = patch_grid(self.student, (student_images.shape[2], student_images.shape[3]))
        return torch.rand(len(student_images), grid[0] * grid[1], device=student_images.device).argsort(dim=1)

    def visible(self, order_BN: Tensor | None, side: str | None = None) -> Tensor | None:
        """The visible patches (B, V), or those one side alone is shown; None: all."""
        if order_BN is None or (side is not None and self.mask not in (side, "both")):
            return None
        return order_BN[:, : max(int(order_BN.shape[1] * (1 - self.mask_ratio)), 1)]

    def fit(self, teacher_images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The teacher's photos, resized with ``align``: "image" to the student's grid, "tokens" up to whole patches."""
        if self.align is None:
            return teacher_images
        shown = teacher_images.shape[2:]
        wanted = grid if self.align == "image" else patch_grid(self.teacher, (shown[0], shown[1]))
        size = [side * patch_size(self.teacher) for side in wanted]
        if self.align == "tokens" and size == [*shown]:
            return teacher_images
        return F.interpolate(teacher_images, size=size, mode="bicubic", antialias=True)

    def student_taps(self) -> dict[int, tuple[str, ...]]:
        """What the losses read from the student: block -> taps."""
        wanted = self._wanted("student")
        if self.mae is not None:
            wanted[self.student.depth] = (*wanted.get(self.student.depth, ()), "output")
        return wanted

    def _wanted(self, side: str) -> dict[int, tuple[str, ...]]:
        """Block -> taps of one side."""
        wanted: dict[int, tuple[str, ...]] = {}
        for target in self.targets:
            block = target.student_block if side == "student" else target.teacher_block
            wanted[block] = tuple(dict.fromkeys((*wanted.get(block, ()), *target.taps)))
        return wanted

    def _tokens(
        self, taps: dict[str, Tensor], target: Target, side: str, keep_BV: Tensor | None, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The tokens that are compared: on the student's grid, those both sides have."""
        model = self.student if side == "student" else self.teacher
        if target.kind == "class_token":
            return {"class_token": taps["output"][:, 0]}
        out = {}
        for name in target.taps:
            x_BTD = pair_tokens(taps[name], model, self.class_token)
            if side == "teacher" and self.align == "tokens":
                x_BTD = resample(x_BTD, int(self.class_token), grid)
            if keep_BV is not None and self.mask not in (side, "both"):
                x_BTD = keep_patches(x_BTD, keep_BV, int(self.class_token))
            out[name] = x_BTD
        return out

    def _compare(self, i: int, target: Target, s: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of one target."""
        if target.kind == "relation":
            return relation_losses(s, t, self.relation_heads, target.parts, self.softmax)
        out = {}
        for part in target.parts:
            mapped = self.maps[f"{i}_{part}"](s[part]) if f"{i}_{part}" in self.maps else s[part]
            out[part] = (class_token_kl if target.kind == "class_token" else feature_loss)(mapped, t[part])
        return out

    def loss_name(self, target: Target, name: str) -> str:
        """What a loss is called: with its blocks where the same is compared at several."""
        if sum(name in other.parts for other in self.targets) == 1:
            return name
        return f"{name}@{target.teacher_block}:{target.student_block}"


def _add_drop_path(teacher: Any, rate: float) -> list[nn.Module]:
    """Stochastic depth for a frozen teacher; its modules, to be switched on while the student trains."""
    if not 0 <= rate < 1:
        raise ConfigError(f"teacher_drop_path={rate}", "it is a share from 0 to below 1", "e.g. 0.1")
    drops: list[nn.Module] = []
    for block in teacher.blocks if rate else ():
        for name in ("drop_path",) if isinstance(teacher, ViT) else ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(rate))
            drops.append(getattr(block, name))
    return drops
