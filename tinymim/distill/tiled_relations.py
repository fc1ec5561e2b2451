"""The relation loss without stored relations: scores exist one tile at a time; loss and gradient come from one pass.

The loss is a mean, so its gradient is known up to the factor that arrives in backward. Tile by tile over query rows the
scores of both sides are made, compared, turned into the gradient of the student's operands, and dropped: what is kept
for backward has the size of those operands, and nothing is computed twice. A row of the KL divergence (equation 9 of
TinyMIM, arXiv 2301.01296) and its gradient with respect to the student's scores:

    KL = sum_j p_t (log p_t - log p_s)         dKL / ds_s = p_s - p_t

On a GPU a Triton kernel does this (:mod:`tinymim.distill.kernels.relation_loss`, running maxima and sums as in
FlashAttention, arXiv 2205.14135); everywhere else, or where that kernel fails, the chunked form below. A further
comparison of scores is one more function like :func:`kl_of_tile`.

Legend: B = batch, T = tokens, D = width, H = relation heads, C = D / H; of a tile: U = pairs of image and head,
R = query rows.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinymim.distill.kernels import Sums, empty_gradients

TILE_BYTES = 1 << 19  # of a tile of scores, per thread of the CPU: several of them stay in the cache
GPU_TILE_BYTES = 1 << 26


def relation_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int, beta: float | None = None
) -> Tensor:
    """Compare the relation A B^T / sqrt(C) of student and teacher, in memory linear in the tokens.

    Products of float16 and bfloat16 tensors are summed in float32; softmax and loss are float32 (float64 of float64).

    Args:
        student: A and B, each (B, T, D_s), any strides; the same object twice is a relation of a tensor with itself.
        teacher: The same, each (B, T, D_t); needs no gradient and gets none.
        heads: Relation heads; must divide both widths.
        beta: None: KL(teacher || student) of the rows' softmax, nats, mean over batch, heads and query rows; else the
            smooth L1 distance of the scores with this beta, mean over all of them.

    Returns:
        A scalar, differentiable once.
    """
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    (a_s, b_s), (a_t, b_t) = _operands(*student), _operands(*teacher)
    loss, *_ = _relation_loss(a_s, b_s, a_t.detach(), None if b_t is None else b_t.detach(), heads, beta, grad)
    return loss


def _operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
    """A, and B in the same type or None if it is A."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), None if b is a else b.to(dtype)


@torch.library.custom_op("tinymim::relation_loss", mutates_args=())
def _relation_loss(
    a_s: Tensor, b_s: Tensor | None, a_t: Tensor, b_t: Tensor | None, heads: int, beta: float | None, grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = find_kernel(
        a_s.device, a_s.dtype, a_t.dtype, a_s.shape[2] // heads, a_t.shape[2] // heads, beta is None, b_s is None
    )
    with torch.autocast(a_s.device.type, enabled=False):
        total, da, db = (kernel or chunked)(a_s, b_s, a_t, b_t, heads, beta, grad)
    return total / _count(a_s, heads, beta), da, db


def _count(a_BTD: Tensor, heads: int, beta: float | None) -> int:
    """Values that the loss is the mean of."""
    B, T, _ = a_BTD.shape
    return B * heads * T * (1 if beta is None else T)


@_relation_loss.register_fake
def _(a_s: Tensor, b_s: Any, a_t: Tensor, b_t: Any, heads: int, beta: float | None, grad: bool) -> Sums:
    return a_s.new_empty((), dtype=sum_type(a_s)), *empty_gradients(a_s, b_s, grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sums) -> None:
    a_s, b_s, _, _, heads, beta, _ = inputs
    ctx.count, ctx.dtype, ctx.one = _count(a_s, heads, beta), a_s.dtype, b_s is None
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("the relation loss is differentiable once; use relation_kl for gradients of its gradient")
    da, db = ((saved * (grad / ctx.count)).to(ctx.dtype) for saved in ctx.saved_tensors)
    return da, None if ctx.one else db, None, None, None, None, None


_relation_loss.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tinymim.relation_loss)
def _flop(a_s: Any, b_s: Any, a_t: Any, b_t: Any, heads: int, beta: float | None, grad: bool, **_: Any) -> int:
    """Products of both sides' scores and, with a gradient, of the student's two operands; shapes come in."""
    B, T, D = a_s
    return 2 * B * T * T * (D + a_t[2] + 2 * D * grad)


# chunked form -----------------------------------------------------------------------------------------------------


def sum_type(x: Tensor) -> torch.dtype:
    """What scores are computed in: float32, or float64 of float64."""
    return torch.promote_types(x.dtype, torch.float32)


def kl_of_tile(s_URT: Tensor, t_URT: Tensor) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher || student) of whole rows of scores; its gradient (U, R, T) with respect to the student's."""
    log_s, log_t = s_URT.log_softmax(-1), t_URT.log_softmax(-1)
    p_t = log_t.exp()
    total = torch.dot(p_t.view(-1), log_t.sub_(log_s).view(-1))
    return total, log_s.exp_().sub_(p_t)


def smooth_l1_of_tile(s_URT: Tensor, t_URT: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Summed smooth L1 distance of scores, and its gradient (U, R, T) with respect to the student's."""
    off = s_URT.sub_(t_URT)
    near = off.clamp(-beta, beta)
    return torch.dot(near.view(-1), off.sub_(near, alpha=0.5).view(-1)) / beta, near.div_(beta)


def chunked(
    a_s: Tensor, b_s: Tensor | None, a_t: Tensor, b_t: Tensor | None, heads: int, beta: float | None, grad: bool
) -> Sums:
    """Loss and gradients with PyTorch's own operators, whole rows at a time; arguments as the kernel's."""
    B, T, _ = a_s.shape
    compare = kl_of_tile if beta is None else functools.partial(smooth_l1_of_tile, beta=beta)
    dtype, totals = sum_type(a_s), []
    da, db = empty_gradients(a_s, b_s, grad)
    operands = a_s, a_s if b_s is None else b_s, a_t, a_t if b_t is None else b_t
    unused = a_s.new_empty(1, dtype=dtype)
    images, tiles = plan_tiles(B, heads, T, dtype.itemsize, a_s.device.type)
    for i in range(0, B, images):
        s_a, s_b, t_a, t_b = (_heads_first(x, i, images, heads, dtype) for x in operands)
        c_s, c_t = s_a.shape[-1] ** -0.5, t_a.shape[-1] ** -0.5
        d_a = torch.zeros_like(s_a) if grad else s_a
        d_b = d_a if b_s is None else torch.zeros_like(d_a)
        for units, rows in tiles(len(s_a)):
            s_URC, t_URC = s_a[units, rows], t_a[units, rows]
            total, g_URT = compare(
                torch.baddbmm(unused, s_URC, s_b[units].transpose(1, 2), beta=0, alpha=c_s),
                torch.baddbmm(unused, t_URC, t_b[units].transpose(1, 2), beta=0, alpha=c_t),
            )
            totals.append(total)
            if grad:
                d_a[units, rows].baddbmm_(g_URT, s_b[units], alpha=c_s)
                d_b[units].baddbmm_(g_URT.transpose(1, 2), s_URC, alpha=c_s)
        if grad:
            for out, each in ((da, d_a), (db, d_b))[: 1 if b_s is None else 2]:
                out[i : i + images].unflatten(2, (heads, -1)).copy_(each.unflatten(0, (-1, heads)).transpose(1, 2))
    return torch.stack(totals).sum(), da, db


def _heads_first(x_BTD: Tensor, start: int, images: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Some images as (images * H, T, C), contiguous."""
    x_BHTC = x_BTD[start : start + images].unflatten(2, (heads, -1)).transpose(1, 2)
    return x_BHTC.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 1)


def plan_tiles(
    batch: int, heads: int, tokens: int, itemsize: int, device: str
) -> tuple[int, Callable[[int], Iterator[tuple[slice, slice]]]]:
    """Images to unpack at a time, and a function: their pairs of image and head -> (pairs, rows) of each tile."""
    limit = (TILE_BYTES * torch.get_num_threads() if device == "cpu" else GPU_TILE_BYTES) // itemsize
    rows = min(max(limit // tokens, 1), tokens)
    units = max(limit // (rows * tokens), 1)

    def tiles(count: int) -> Iterator[tuple[slice, slice]]:
        for u in range(0, count, units):
            for r in range(0, tokens, rows):
                yield slice(u, u + units), slice(r, r + rows)

    return min(max(units // heads, 1), batch), tiles


# the choice -------------------------------------------------------------------------------------------------------


def takes_kernel(device: torch.device) -> bool:
    """Whether a GPU has tensor cores that take bfloat16 (compute capability 8)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


@functools.cache
def find_kernel(
    device: torch.device, student: torch.dtype, teacher: torch.dtype, c_s: int, c_t: int, softmax: bool, one: bool
) -> Callable[..., Sums] | None:
    """The Triton kernel for these types and widths if it runs here and agrees with :func:`chunked`; decided once.

    A GPU that should run it and does not is named in a warning.
    """
    if not takes_kernel(device) or torch.float64 in (student, teacher):
        return None
    draw = torch.Generator(device).manual_seed(0)
    sides = [(c_s, student)] * 2 + [(c_t, teacher)] * 2
    a_s, b_s, a_t, b_t = (torch.randn(1, 70, 2 * c, generator=draw, device=device).to(dtype) for c, dtype in sides)
    call = a_s, None if one else b_s, a_t, None if one else b_t, 2, None if softmax else 1.0, True
    try:
        from tinymim.distill.kernels.relation_loss import relation_loss

        for got, wanted in zip(relation_loss(*call), chunked(*call), strict=True):
            torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    except Exception as error:  # whatever a compiler, a driver or a comparison says
        warnings.warn(f"relation losses run without their Triton kernel: {error}", stacklevel=2)
        return None
    return relation_loss
