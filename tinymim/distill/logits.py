"""Distillation from a classifier's answers, as DeiT does it (arXiv 2012.12877, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def hard_distillation(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross entropy with the teacher's decision (DeiT, equation 3, its second half)."""
    return F.cross_entropy(student_BK.float(), teacher_BK.argmax(dim=1))


def soft_distillation(student_BK: Tensor, teacher_BK: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of answers softened by ``tau``: DeiT's equation 2, summed over classes.

    The mean is over the batch alone, as the equation reads; code that also divides by the number of classes wants an
    ``alpha`` that much nearer to 1.
    """
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student_BK, teacher_BK))
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
