"""Token-relation losses (TinyMIM, arXiv 2301.01296, section 3.2, equation 9) as pure functions.

Legend: B = batch, T = tokens (class token included), D = width, H = relation heads, C = D / H.
"""

import torch
from torch import Tensor


def relation_logits(a_BTD: Tensor, b_BTD: Tensor, heads: int) -> Tensor:
    """Scaled products A B^T / sqrt(C) per relation head, float32: (B, T, D) x2 -> (B, H, T, T).

    Channels are regrouped into ``heads`` groups whatever the model's own head count, so student and teacher of any
    width agree in shape (the paper's "adaptive last block" needs no module).
    """
    B, T, D = a_BTD.shape
    C = D // heads
    a_BHTC = a_BTD.reshape(B, T, heads, C).transpose(1, 2)
    b_BHTC = b_BTD.reshape(B, T, heads, C).transpose(1, 2)
    return ((a_BHTC * C**-0.5) @ b_BHTC.transpose(2, 3)).float()


def relation_kl(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """KL(teacher || student) of two relation logits, in log space: mean over batch, heads and query rows."""
    log_s = student_BHTT.log_softmax(-1)
    log_t = teacher_BHTT.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def relation_losses(student: dict[str, Tensor], teacher: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The published pair of losses.

    Args:
        student: ``q``, ``k``, ``v``, each (B, T, D_s).
        teacher: ``q``, ``k``, ``v``, each (B, T, D_t).
        heads: Relation heads; must divide both widths.

    Returns:
        ``qk`` (the attention maps) and ``vv``, differentiable scalars.
    """
    losses = {}
    for name, (a, b) in {"qk": ("q", "k"), "vv": ("v", "v")}.items():
        with torch.autocast(student[a].device.type, enabled=False):
            losses[name] = relation_kl(
                relation_logits(student[a].float(), student[b].float(), heads),
                relation_logits(teacher[a].float(), teacher[b].float(), heads),
            )
    return losses
