"""Distillation from a classifier's answers, as DeiT does it (arXiv 2012.12877, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def hard_distillation(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross entropy with the teacher's decision (DeiT, equation 3, its second half)."""
    return F.cross_entropy(student_BK.float(), teacher_BK.argmax(dim=1))


def soft_distillation(student_BK: Tensor, teacher_BK: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of answers softened by ``tau`` (DeiT, equation 2), mean over the batch."""
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student_BK, teacher_BK))
    return tau**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
