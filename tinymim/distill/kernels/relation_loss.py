"""The relation loss on a GPU: scores exist in registers only.

Two kernels. :func:`_rows` goes over the key tiles of its query rows: once for the running maxima and sums of both sides
(FlashAttention, arXiv 2205.14135) and the loss, once more for the gradient of A. :func:`_columns` goes over the query
tiles of its keys for the gradient of B. A relation of a tensor with itself has symmetric scores: a tile of the gradient
and its transpose come from the same scores, so ``_columns`` alone makes the whole gradient. No atomics, so runs repeat
bit for bit; no synchronisation with the host.

Legend: B = batch, T = tokens, D = width, H = relation heads, C = D / H; M = query rows and N = keys of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinymim.distill.kernels import Sums, empty_gradients

OPERAND_BYTES = 32 << 10  # of the four operands of a tile; with the next keys on their way they fit GPUs of 99 KiB
HALF_SCALE = 1024.0  # float16 score gradients (at most 1) are multiplied by this: below 6e-5 they would lose digits


@triton.jit
def _load(x, start, T, C, stride_t, tile: tl.constexpr, width: tl.constexpr):
    """(tile, width) of a head's (T, C), from a row on; zeros outside."""
    row, column = start + tl.arange(0, tile), tl.arange(0, width)
    inside = (row < T)[:, None] & (column < C)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride_t + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, start, T, C, stride_t, tile: tl.constexpr, width: tl.constexpr):
    row, column = start + tl.arange(0, tile), tl.arange(0, width)
    inside = (row < T)[:, None] & (column < C)[None, :]
    tl.store(x + row.to(tl.int64)[:, None] * stride_t + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b):
    """a b^T, summed in float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _rows(
    a_s, b_s, a_t, b_t, da, sums, lse_s, lse_t,
    H, T, C_s, C_t, scale_s, scale_t, beta,
    a_s_b, a_s_t, b_s_b, b_s_t, a_t_b, a_t_t, b_t_b, b_t_t,
    SOFTMAX: tl.constexpr, GRAD: tl.constexpr, G_SCALE: tl.constexpr,
    TILE: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
):  # fmt: skip
    """Loss of TILE query rows, their log-sum-exps, and with GRAD the gradient of A."""
    tiles = tl.cdiv(T, TILE)
    unit, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    image, head = (unit // H).to(tl.int64), unit % H
    b_s += image * b_s_b + head * C_s
    b_t += image * b_t_b + head * C_t
    q_s = _load(a_s + image * a_s_b + head * C_s, m, T, C_s, a_s_t, TILE, WIDTH_S)
    q_t = _load(a_t + image * a_t_b + head * C_t, m, T, C_t, a_t_t, TILE, WIDTH_T)
    row = m + tl.arange(0, TILE)
    max_s = tl.full([TILE], float("-inf"), tl.float32)
    max_t = tl.full([TILE], float("-inf"), tl.float32)
    sum_s = tl.zeros([TILE], tl.float32)
    sum_t = tl.zeros([TILE], tl.float32)
    loss = tl.zeros([TILE], tl.float32)
    grad = tl.zeros([TILE, WIDTH_S], tl.float32)
    for n in range(0, T, TILE):
        k_s = _load(b_s, n, T, C_s, b_s_t, TILE, WIDTH_S)
        k_t = _load(b_t, n, T, C_t, b_t_t, TILE, WIDTH_T)
        inside = (n + tl.arange(0, TILE) < T)[None, :]
        s = _product(q_s, k_s) * scale_s
        t = _product(q_t, k_t) * scale_t
        if SOFTMAX:
            off = t - s
            s = tl.where(inside, s, float("-inf"))
            t = tl.where(inside, t, float("-inf"))
            new_s = tl.maximum(max_s, tl.max(s, 1))
            new_t = tl.maximum(max_t, tl.max(t, 1))
            p_t = tl.exp(t - new_t[:, None])
            sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(s - new_s[:, None]), 1)
            shrink = tl.exp(max_t - new_t)
            sum_t = sum_t * shrink + tl.sum(p_t, 1)
            loss = loss * shrink + tl.sum(p_t * off, 1)
            max_s = new_s
            max_t = new_t
        else:
            off = tl.where(inside, s - t, 0.0)
            near = tl.minimum(tl.maximum(off, -beta), beta)
            loss += tl.sum(near * (off - 0.5 * near), 1) / beta
            if GRAD:
                g = near * (G_SCALE / beta)
                grad += tl.dot(g.to(k_s.dtype), k_s, input_precision="ieee")
    if SOFTMAX:
        end_s = max_s + tl.log(sum_s)
        end_t = max_t + tl.log(sum_t)
        loss = loss / sum_t + (end_s - end_t)
        tl.store(lse_s + unit.to(tl.int64) * T + row, end_s, mask=row < T)
        tl.store(lse_t + unit.to(tl.int64) * T + row, end_t, mask=row < T)
        if GRAD:
            for n in range(0, T, TILE):
                k_s = _load(b_s, n, T, C_s, b_s_t, TILE, WIDTH_S)
                k_t = _load(b_t, n, T, C_t, b_t_t, TILE, WIDTH_T)
                s = _product(q_s, k_s) * scale_s
                t = _product(q_t, k_t) * scale_t
                g = (tl.exp(s - end_s[:, None]) - tl.exp(t - end_t[:, None])) * G_SCALE
                grad += tl.dot(g.to(k_s.dtype), k_s, input_precision="ieee")  # keys beyond T are zero
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(row < T, loss, 0.0), 0))
    if GRAD:
        D = H * C_s
        _store(da + image * T * D + head * C_s, grad * (scale_s / G_SCALE), m, T, C_s, D, TILE, WIDTH_S)


@triton.jit
def _columns(
    a_s, b_s, a_t, b_t, db, lse_s, lse_t,
    H, T, C_s, C_t, scale_s, scale_t, beta,
    a_s_b, a_s_t, b_s_b, b_s_t, a_t_b, a_t_t, b_t_b, b_t_t,
    SOFTMAX: tl.constexpr, ONE: tl.constexpr, G_SCALE: tl.constexpr,
    TILE: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE keys; with ONE, where A is B, their gradient as queries is added."""
    tiles = tl.cdiv(T, TILE)
    unit, n = tl.program_id(0) // tiles, tl.program_id(0) % tiles * TILE
    image, head = (unit // H).to(tl.int64), unit % H
    a_s += image * a_s_b + head * C_s
    a_t += image * a_t_b + head * C_t
    lse_s += unit.to(tl.int64) * T
    lse_t += unit.to(tl.int64) * T
    k_s = _load(b_s + image * b_s_b + head * C_s, n, T, C_s, b_s_t, TILE, WIDTH_S)
    k_t = _load(b_t + image * b_t_b + head * C_t, n, T, C_t, b_t_t, TILE, WIDTH_T)
    key = n + tl.arange(0, TILE)
    grad = tl.zeros([TILE, WIDTH_S], tl.float32)
    if SOFTMAX and ONE:
        key_s = tl.load(lse_s + key, mask=key < T, other=0.0)
        key_t = tl.load(lse_t + key, mask=key < T, other=0.0)
    for m in range(0, T, TILE):
        q_s = _load(a_s, m, T, C_s, a_s_t, TILE, WIDTH_S)
        q_t = _load(a_t, m, T, C_t, a_t_t, TILE, WIDTH_T)
        s = _product(k_s, q_s) * scale_s
        t = _product(k_t, q_t) * scale_t
        if SOFTMAX:
            row = m + tl.arange(0, TILE)
            end_s = tl.load(lse_s + row, mask=row < T, other=0.0)
            end_t = tl.load(lse_t + row, mask=row < T, other=0.0)
            g = tl.exp(s - end_s[None, :]) - tl.exp(t - end_t[None, :])
            if ONE:
                g += tl.exp(s - key_s[:, None]) - tl.exp(t - key_t[:, None])
        else:
            g = tl.minimum(tl.maximum(s - t, -beta), beta) / beta
            if ONE:
                g *= 2.0
        grad += tl.dot((g * G_SCALE).to(q_s.dtype), q_s, input_precision="ieee")  # queries beyond T are zero
    D = H * C_s
    _store(db + image * T * D + head * C_s, grad * (scale_s / G_SCALE), n, T, C_s, D, TILE, WIDTH_S)


def relation_loss(
    a_s: Tensor, b_s: Tensor | None, a_t: Tensor, b_t: Tensor | None, heads: int, beta: float | None, grad: bool
) -> Sums:
    """Loss and gradients, not yet divided by the count, as :func:`tinymim.distill.tiled_relations.chunked` gives them.

    Args:
        a_s: (B, T, D_s), like every operand with neighbouring channels side by side; float16, bfloat16 or float32.
        b_s: (B, T, D_s) of the same type; None: the same as ``a_s``.
        a_t: (B, T, D_t).
        b_t: (B, T, D_t) of the same type, or None.
        heads: Relation heads.
        beta: None for KL, else smooth L1's.
        grad: Whether gradients are wanted.

    Raises:
        ValueError: heads too wide for the memory of a multiprocessor.
    """
    B, T, D = a_s.shape
    one, half = b_s is None, a_s.dtype is torch.float16
    pairs = a_s, a_s if b_s is None else b_s, a_t, a_t if b_t is None else b_t
    operands = [x if x.stride(2) == 1 else x.contiguous() for x in pairs]
    c_s, c_t = D // heads, a_t.shape[2] // heads
    width_s, width_t = (max(triton.next_power_of_2(c), 16) for c in (c_s, c_t))
    tile = 64
    while 2 * tile * (width_s * a_s.itemsize + width_t * a_t.itemsize) > OPERAND_BYTES:
        tile //= 2
    if tile < 16:
        raise ValueError(f"relation heads of {c_s} and {c_t} channels are too wide")
    programs = B * heads * triton.cdiv(T, tile)
    da, db = empty_gradients(a_s, b_s, grad)
    sums = a_s.new_empty(programs, dtype=torch.float32)
    lse = a_s.new_empty((2, B, heads, T) if beta is None else (2, 0), dtype=torch.float32)
    numbers = heads, T, c_s, c_t, c_s**-0.5, c_t**-0.5, beta or 0.0
    strides = [stride for x in operands for stride in x.stride()[:2]]
    options: dict[str, Any] = dict(
        SOFTMAX=beta is None, G_SCALE=HALF_SCALE if half else 1.0, TILE=tile, WIDTH_S=width_s, WIDTH_T=width_t
    )
    with torch.cuda.device_of(a_s):
        _rows[(programs,)](
            *operands, da, sums, *lse, *numbers, *strides, GRAD=grad and not one, num_stages=2, **options
        )
        if grad:
            out = da if one else db
            _columns[(programs,)](*operands, out, *lse, *numbers, *strides, ONE=one, num_stages=2, **options)
    return sums.sum(), da, db
