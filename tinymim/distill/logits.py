"""Distillation from a classifier's logits, as in DeiT (arXiv 2012.12877, section 3).

Legend: B = batch, K = classes.
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
