"""Distillation from a classifier's logits: DeiT (arXiv 2012.12877, section 3), and sparse ones (TinyViT, 2207.10666).

Legend: B = batch, K = classes; of sparse targets K = the most probable classes that were kept, C = all classes.
"""

import torch.nn.functional as F
from torch import Tensor


def hard_distillation(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross entropy with the teacher's predicted class, a scalar (DeiT, second half of equation 3)."""
    return F.cross_entropy(student_BK.float(), teacher_BK.argmax(dim=1))


def soft_distillation(student_BK: Tensor, teacher_BK: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of logits divided by ``tau``, summed over classes, a scalar (DeiT, equation 2).

    The mean is over the batch alone, as in the equation; code that also divides by the number of classes needs a
    correspondingly larger ``alpha``.
    """
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student_BK, teacher_BK))
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def sparse_cross_entropy(student_BC: Tensor, values_BK: Tensor, indices_BK: Tensor, tau: float = 1.0) -> Tensor:
    """Cross entropy with a teacher's probabilities of which the K largest were kept, a scalar, in float32.

    What these lack of 1 is spread evenly over the C - K other classes (TinyViT, section 3.1). Half-precision rounding
    can let them sum to more than 1: nothing is spread then, and they are divided by their sum.

    Args:
        student_BC: Logits.
        values_BK: Probabilities at temperature 1.
        indices_BK: Their classes, int64, each at most once.
        tau: Temperature: targets become p^(1/tau), normalised again, logits are divided by it, and the loss is
            multiplied by its square (Hinton et al., arXiv 1503.02531, section 2).
    """
    others = student_BC.shape[1] - values_BK.shape[1]
    logs_BC = F.log_softmax(student_BC.float() / tau, dim=1)
    kept_BK = values_BK.float()
    rest_B = (1 - kept_BK.sum(1)).clamp(min=0) / max(others, 1) if others else kept_BK.new_zeros(len(kept_BK))
    if tau != 1:
        kept_BK, rest_B = kept_BK ** (1 / tau), rest_B ** (1 / tau)
    sum_B = kept_BK.sum(1) + others * rest_B
    own_BK = logs_BC.gather(1, indices_BK)
    spread_B = rest_B * (logs_BC.sum(1) - own_BK.sum(1))
    return -(tau**2) * (((kept_BK * own_BK).sum(1) + spread_B) / sum_B).mean()
