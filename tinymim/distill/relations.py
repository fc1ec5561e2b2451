"""Token-relation losses (TinyMIM, arXiv 2301.01296, section 3.2, equation 9) as pure functions.

:func:`relation_losses` never stores a relation; the functions on stored scores are its plain form.

Legend: B = batch, T = tokens (class token included), D = width, H = relation heads, C = D / H.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from tinymim.distill.features import BETA
from tinymim.distill.tiled_relations import relation_loss


def relation_logits(a_BTD: Tensor, b_BTD: Tensor, heads: int) -> Tensor:
    """Scaled products A B^T / sqrt(C) per relation head, float32: (B, T, D) x2 -> (B, H, T, T).

    Channels are regrouped into ``heads`` groups, whatever the model's own head count, so that the shapes of student and
    teacher agree at any width (the paper's "adaptive last block" needs no module).
    """
    C = a_BTD.shape[-1] // heads
    a_BHTC, b_BHTC = (x_BTD.unflatten(2, (heads, C)).transpose(1, 2) for x_BTD in (a_BTD, b_BTD))
    return ((a_BHTC * C**-0.5) @ b_BHTC.transpose(2, 3)).float()


def relation_kl(student_BHTT: Tensor, teacher_BHTT: Tensor) -> Tensor:
    """KL(teacher || student) of relation logits (B, H, T, T), in nats, mean over batch, heads and query rows.

    Computed in log space.
    """
    log_s = student_BHTT.log_softmax(-1)
    log_t = teacher_BHTT.log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def relation_smooth_l1(student_BHTT: Tensor, teacher_BHTT: Tensor, beta: float = BETA) -> Tensor:
    """The loss without softmax: smooth L1 of the scaled scores (B, H, T, T), mean over all of them.

    The paper reports such rows (table 7) but does not name their loss; KL is undefined for signed scores. Smooth L1
    with the beta of the feature loss (equation 8) is our reading.
    """
    return F.smooth_l1_loss(student_BHTT, teacher_BHTT, beta=beta)


def relation_losses(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    heads: int,
    relations: Sequence[str] = ("qk", "vv"),
    softmax: bool = True,
) -> dict[str, Tensor]:
    """Losses of chosen relations; the default is the published pair. The teacher gets no gradient.

    Args:
        student: ``q``, ``k`` and ``v``, as far as the relations need them, each (B, T, D_s).
        teacher: The same, each (B, T, D_t).
        heads: Relation heads; must divide both widths.
        relations: Two letters each, e.g. "qk" (the attention maps), "vv", "qq", "kk".
        softmax: KL of the rows' softmax (equation 9); else :func:`relation_smooth_l1`.

    Returns:
        Relation -> differentiable scalar.
    """
    beta = None if softmax else BETA
    return {
        name: relation_loss((student[name[0]], student[name[1]]), (teacher[name[0]], teacher[name[1]]), heads, beta)
        for name in relations
    }
