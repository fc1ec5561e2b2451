"""The pixel loss of a head, strip by strip: up-sampled logits of a whole batch are never stored.

MMSegmentation up-samples a head's logits to the crop's size (B = 16, 150 classes, 512 pixels: 2.5 GB) and passes over
them for the softmax, for its gradient and, with ``topk``, for the accuracy. Here a strip of rows is up-sampled, gives
its part of the loss, of the accuracy and of the gradient, and is forgotten. Bilinear up-sampling is a product with a
matrix on either side; the matrices are those of ``F.interpolate``.

Legend: B = batch, C = classes, h, w = logits' height and width, H, W = labels' height and width, R = rows of a strip.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor, nn

STRIP = {"cpu": 1 << 20}  # values of a strip: what stays in a processor's cache
STRIP_ELSEWHERE = 1 << 26
EPS = torch.finfo(torch.float32).eps  # MMSegmentation adds it to every count that it divides by


def tile_losses(model: Any) -> None:
    """Let the heads of a segmentor compute their loss in strips, where it is plain cross-entropy of up-sampled logits;
    any other head keeps its own.

    Args:
        model: An ``EncoderDecoder``, changed in place; its loss is the same up to rounding.
    """
    for head in (model.decode_head, getattr(model, "auxiliary_head", None)):
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            if _is_plain(part):
                setattr(part, "loss_by_feat", functools.partial(_loss_by_feat, part))  # noqa: B010 (a module's own)


def _is_plain(head: Any) -> bool:
    """Whether a head's loss is MMSegmentation's default, without pixel sampling."""
    loss: Any = getattr(head, "loss_decode", None)
    return (
        isinstance(head, BaseDecodeHead)
        and type(head).loss_by_feat is BaseDecodeHead.loss_by_feat
        and head.sampler is None
        and isinstance(head.ignore_index, int)
        and type(loss) is CrossEntropyLoss
        and not (loss.use_sigmoid or loss.use_mask)
        and isinstance(loss.class_weight, list | tuple | None)
        and loss.reduction == "mean"
    )


def _loss_by_feat(head: Any, logits_BChw: Tensor, samples: list[Any]) -> dict[str, Tensor]:
    """``BaseDecodeHead.loss_by_feat``: the named loss, and ``acc_seg``, the percentage of correct pixels."""
    labels_BHW = torch.stack([sample.gt_sem_seg.data for sample in samples]).squeeze(1)
    criterion = head.loss_decode
    given = criterion.class_weight
    loss, accuracy = upsampled_cross_entropy(
        logits_BChw,
        labels_BHW,
        head.ignore_index,
        head.align_corners,
        criterion.avg_non_ignore,
        None if given is None else torch.tensor(given, device=logits_BChw.device),
    )
    return {criterion.loss_name: criterion.loss_weight * loss, "acc_seg": accuracy}


def upsampled_cross_entropy(
    logits_BChw: Tensor,
    labels_BHW: Tensor,
    ignore: int,
    align_corners: bool = False,
    over_labelled: bool = False,
    weight_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of logits, bilinearly up-sampled to the labels' size.

    Args:
        logits_BChw: Logits of any floating type; the loss is computed in float32, or float64 if they are.
        labels_BHW: Class of every pixel, int64.
        ignore: Label of pixels without loss.
        align_corners: As in ``F.interpolate``.
        over_labelled: Divide by the number of labelled pixels instead of that of all pixels.
        weight_C: Weight of each class, (C,). The loss is then divided by the sum of the labelled pixels' weights, as
            PyTorch does; MMSegmentation's own loss with weights fails on pixels to ignore.

    Returns:
        The loss, (), and the percentage of labelled pixels whose class has the highest logit, (1,), without gradient.
    """
    loss, accuracy = _UpsampledCrossEntropy.apply(
        logits_BChw, labels_BHW, ignore, align_corners, over_labelled, weight_C
    )
    return loss, accuracy


class _UpsampledCrossEntropy(torch.autograd.Function):
    """The gradient is computed beside the loss, at the size of the logits, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore: int,
        align: bool,
        over_labelled: bool,
        weight_C: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (count, classes, h, w), (_, height, width) = logits.shape, labels.shape
        kind = torch.promote_types(logits.dtype, torch.float32)
        budget = STRIP.get(logits.device.type, STRIP_ELSEWHERE)
        photos = max(budget // (classes * height * width), 1)
        rows = min(max(budget // (classes * width), 1), height)
        down_Ww = _weights(w, width, align, kind, logits.device)
        down_Hh = _weights(h, height, align, kind, logits.device)
        counted_BHW = labels != ignore
        labelled = counted_BHW.sum()
        if weight_C is None:
            weight_BHW, parts = None, labelled if over_labelled else labels.numel()
        else:
            weight_BHW = weight_C.to(kind)[labels.where(counted_BHW, 0)] * counted_BHW
            parts = weight_BHW.sum()
        per_pixel = 1 / (parts + EPS)
        loss = torch.zeros((), dtype=torch.float64, device=logits.device)
        right = torch.zeros((), dtype=torch.int64, device=logits.device)
        gradient = torch.empty_like(logits, dtype=kind)
        with torch.autocast(logits.device.type, enabled=False):
            for at in range(0, count, photos):
                group = slice(at, at + photos)
                wide_BChW = logits[group].to(kind) @ down_Ww.T
                back_BChW = torch.zeros_like(wide_BChW)
                for top, bottom, low, high in _strips(h, height, align, rows):
                    down = down_Hh[top:bottom, low:high]
                    counted_B1RW = counted_BHW[group, None, top:bottom]
                    target_B1RW = labels[group, None, top:bottom].where(counted_B1RW, 0)
                    scores_BCRW = down @ wide_BChW[:, :, low:high]
                    most_B1RW = scores_BCRW.amax(1, keepdim=True)
                    own_B1RW = scores_BCRW.gather(1, target_B1RW)
                    right += ((own_B1RW == most_B1RW) & counted_B1RW).sum()
                    scores_BCRW.sub_(most_B1RW).exp_()
                    sum_B1RW = scores_BCRW.sum(1, keepdim=True)
                    weight_B1RW = counted_B1RW if weight_BHW is None else weight_BHW[group, None, top:bottom]
                    loss += (sum_B1RW.log() + most_B1RW - own_B1RW).mul_(weight_B1RW).sum()
                    scale_B1RW = weight_B1RW * per_pixel
                    scores_BCRW.mul_(scale_B1RW / sum_B1RW).scatter_add_(1, target_B1RW, -scale_B1RW.to(kind))
                    back_BChW[:, :, low:high] += down.T @ scores_BCRW
                gradient[group] = back_BChW @ down_Ww
        ctx.save_for_backward(gradient)
        ctx.kind = logits.dtype
        accuracy = ((right + EPS) * (100.0 / (labelled + EPS))).to(kind).reshape(1)
        ctx.mark_non_differentiable(accuracy)
        return (loss * per_pixel).to(kind), accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss: Tensor, accuracy: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * loss).to(ctx.kind), None, None, None, None, None


@functools.lru_cache(maxsize=32)
def _weights(few: int, many: int, align: bool, kind: torch.dtype, device: torch.device | str) -> Tensor:
    """(many, few): the matrix by which ``F.interpolate`` makes ``many`` values out of ``few``."""
    ones = torch.eye(few, dtype=kind)[None]
    return F.interpolate(ones, size=many, mode="linear", align_corners=align)[0].T.contiguous().to(device)


@functools.lru_cache(maxsize=32)
def _strips(few: int, many: int, align: bool, rows: int) -> tuple[tuple[int, int, int, int], ...]:
    """Strips of output rows, and the input rows they need: (first, behind the last, first, behind the last)."""
    matrix = _weights(few, many, align, torch.float32, "cpu")
    strips = []
    for top in range(0, many, rows):
        used = matrix[top : top + rows].any(0).nonzero()
        strips.append((top, min(top + rows, many), int(used[0]), int(used[-1]) + 1))
    return tuple(strips)
