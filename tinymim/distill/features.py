"""Feature and class-token losses (TinyMIM, arXiv 2301.01296, section 3.2, equations 6 to 8) as pure functions.

Legend: B = batch, T = tokens, D = width.
"""

import torch.nn.functional as F
from torch import Tensor

BETA = 2.0  # beta of the smooth L1 loss, as published


def whiten(x_BTD: Tensor) -> Tensor:
    """LayerNorm over the channels without scale and shift: (B, T, D) -> (B, T, D) (equation 7).

    PyTorch's epsilon is 1e-5: tokens whose channels have a standard deviation below about 0.01 come out smaller.
    """
    return F.layer_norm(x_BTD, x_BTD.shape[-1:])


def feature_loss(student_BTD: Tensor, teacher_BTD: Tensor, beta: float = BETA) -> Tensor:
    """Smooth L1 against the whitened teacher, mean over batch, tokens and channels (equation 8).

    Args:
        student_BTD: The student's tokens after the linear map to the teacher's width.
        teacher_BTD: The teacher's tokens; whitened here.
        beta: Error at which the parabola ends: 0.5 e^2 / beta up to |e| = beta, |e| - beta / 2 beyond.

    Returns:
        Differentiable scalar, float32.
    """
    return F.smooth_l1_loss(student_BTD.float(), whiten(teacher_BTD.float()), beta=beta)


def class_token_kl(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """KL(teacher || student) of two class tokens (B, D), in nats, mean over the batch (equation 6).

    The paper does not say how a token becomes a distribution. A softmax over the channels is our reading, the only one
    that makes its equation 5 valid. The token is the block's output before any final norm, like the features; if a few
    channels dominate it, they dominate the distribution. A student of another width is mapped to the teacher's before.
    """
    log_s, log_t = student_BD.float().log_softmax(-1), teacher_BD.float().log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()
