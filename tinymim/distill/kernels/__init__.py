"""Triton kernels; each module is imported only where it runs (Triton is not on every machine).

Here is what a kernel and its chunked form share.
"""

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor, Tensor]  # loss and gradients of the student's two operands, not yet divided by the count


def empty_gradients(a_s: Tensor, b_s: Tensor | None, grad: bool) -> tuple[Tensor, Tensor]:
    """Buffers for the gradients of the student's operands, contiguous; without elements where there is none.

    float16 could overflow in a sum over rows: its gradients are float32 until they are scaled.
    """
    dtype = torch.float32 if a_s.dtype is torch.float16 else a_s.dtype
    none = a_s.new_empty(0, dtype=dtype)
    if not grad:
        return none, none.clone()
    da = torch.empty_like(a_s, dtype=dtype, memory_format=torch.contiguous_format)
    return da, none if b_s is None else torch.empty_like(da)
