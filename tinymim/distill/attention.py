"""The loss on attention logits of D-MAE (arXiv 2404.12210) as a pure function.

Legend: B = batch, T = tokens, D = width, H = heads.
"""

import torch
from torch import Tensor, nn

from tinymim.distill.relations import relation_logits
from tinymim.distill.tiled_relations import relation_loss

SQUARE = 2.0**20  # smooth L1 with this beta is e^2 / (2 beta) of every error that occurs


def attention_mse(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int, head_map: nn.Module | None
) -> Tensor:
    """Mean squared error of attention logits, over batch, heads, queries and keys; float32, a scalar.

    Args:
        student: Q and K, each (B, T, D_s).
        teacher: Q and K, each (B, T, D_t).
        heads: Of the teacher; without ``head_map`` also of the student.
        head_map: Maps the student's logits (B, H_s, T, T) to (B, H_t, T, T). None: they are compared as they are, tile
            by tile (:mod:`tinymim.distill.tiled_relations`), in memory linear in the tokens.
    """
    if head_map is None:
        return relation_loss(student, teacher, heads, SQUARE) * (2 * SQUARE)
    with torch.autocast(student[0].device.type, enabled=False):
        own_BHTT = relation_logits(student[0].float(), student[1].float(), head_map.in_channels)  # type: ignore[arg-type]
        taught_BHTT = relation_logits(teacher[0].float(), teacher[1].float(), heads)
        return (head_map(own_BHTT) - taught_BHTT).square().mean()
