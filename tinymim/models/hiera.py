"""timm's Hiera (arXiv 2306.00989) on images of any size, whole or masked by whole mask units.

timm's own forward pass accepts one size: here its blocks run on the image's own grid, and positions are interpolated
like the plain ViT's. A mask unit is a square of 8 x 8 tokens (32 pixels), inside which tokens stay together through
all stages: masked units are left out after the embedding. Written after timm's code and Meta's
(https://github.com/facebookresearch/hiera, Apache-2.0).

Legend: B = batch, N = tokens, U = mask units, V = visible ones, D = width, H = heads, W = windows, n = tokens of a
window, C = channels per head.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.hiera import Reroll, Unroll
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinymim.errors import CheckpointError, ConfigError
from tinymim.models.backbone import Shell
from tinymim.models.position import resize_position


class FlatAttention(Shell):
    """timm's ``MaskUnitAttention`` with windows and heads on one axis: fast kernels and ONNX accept four axes only."""

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.attend(x_BND, self.inner.q_stride)[0]

    def attend(self, x_BND: Tensor, pool: int) -> tuple[Tensor, Tensor, Tensor]:
        """Attention whose queries are the maxima of ``pool`` tokens each.

        Returns:
            The output (B, N / pool, D); Q (B, H * W, n / pool, C) and K (B, H * W, n, C).
        """
        its: Any = self.inner
        B, N, _ = x_BND.shape
        windows = self.windows(N)
        qkv = its.qkv(x_BND).reshape(B, -1, windows, 3, its.heads, its.head_dim).permute(3, 0, 4, 2, 1, 5)
        q, k, v = qkv.flatten(2, 3).unbind(0)  # (B, heads * windows, tokens of a window, channels)
        if pool > 1:  # the tokens of a pool are runs, see timm's Unroll
            q = q.unflatten(2, (pool, -1)).amax(dim=2)
        x = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return its.proj(x.unflatten(1, (its.heads, windows)).transpose(1, 3).reshape(B, -1, its.dim_out)), q, k

    def windows(self, tokens: int) -> int:
        """Number of windows of so many tokens: one if attention is global."""
        its: Any = self.inner
        return tokens // (its.q_stride * its.window_size) if its.use_mask_unit_attn else 1


def prepare(model: Any) -> None:
    """Give a new model :class:`FlatAttention`, and the strides of its stages (timm's are those of ``q_pool=3``).

    Raises:
        ConfigError: heads that do not divide the width.
    """
    for i, block in enumerate(model.blocks, 1):
        if block.dim_out % block.attn.heads:
            raise ConfigError(
                f"block {i} of this Hiera has {block.attn.heads} heads and is {block.dim_out} wide",
                "the heads share the width equally",
                "choose embed_dim as a multiple of num_heads",
            )
        block.attn = FlatAttention(block.attn)
    for i, info in enumerate(model.feature_info):
        info["reduction"] = model.patch_stride[0] * model.q_stride[0] ** min(i, model.q_pool)


def recompute(model: Any, block: Any, *args: Any) -> Any:
    """One block, with gradient checkpointing when it is on."""
    if model.grad_checkpointing and model.training and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def stage_lengths(model: Any) -> list[int]:
    """Number of blocks of each stage."""
    return [b - a for a, b in zip([-1, *model.stage_ends], model.stage_ends, strict=False)]


def unit_side(model: Any) -> int:
    """Side of a mask unit, pixels."""
    return int(model.patch_stride[0] * model.mask_unit_size[0])


def position(model: Any, grid: tuple[int, int]) -> Tensor:
    """Positions (1, N, D) for a grid; in "abswin" models the window's part is tiled, the global part resized."""
    if model.pos_embed_win is None:
        return resize_position(model.pos_embed, tuple(model.tokens_spatial_shape), grid, 0)
    window = model.pos_embed_win.tile([side // unit for side, unit in zip(grid, model.mask_unit_size, strict=True)])
    whole = F.interpolate(model.pos_embed, size=window.shape[-2:], mode="bicubic", antialias=True)
    return (whole + window).flatten(2).transpose(1, 2)


def run_hiera(model: Any, images: Tensor, stages: int) -> list[Tensor]:
    """Images of whole mask units -> maps (B, D, H, W) of the first stages."""
    size, ends = tuple(images.shape[-2:]), model.stage_ends
    unroll, reroll = _order(model, size, model.q_pool)
    x_BND = model.patch_embed(images)
    x_BND = unroll(x_BND + position(model, _grid(model, size)))
    maps = []
    for i in range(ends[stages - 1] + 1):
        x_BND = recompute(model, model.blocks[i], x_BND)
        if i in ends:
            maps.append(reroll(x_BND, i).permute(0, 3, 1, 2).contiguous())
    return maps


def _grid(model: Any, size: Any) -> tuple[int, int]:
    return size[0] // model.patch_stride[0], size[1] // model.patch_stride[1]


def _order(model: Any, size: Any, q_pool: int) -> tuple[Unroll, Reroll]:
    """timm's orders of tokens for an image of ``size`` pixels; neither has parameters."""
    stride, schedule = model.patch_stride, model.unroll.schedule
    return Unroll(size, stride, schedule), Reroll(size, stride, schedule, model.stage_ends, q_pool)


def run_masked(
    model: Any, images: Tensor, keep_BV: Tensor, q_pool: int, wanted: Collection[int] = (), *, whole: bool = True
) -> tuple[list[Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Run the visible mask units; pixels of the others have no influence (the embedding's kernels overlap).

    Args:
        model: timm's Hiera with :class:`FlatAttention`.
        images: (B, 3, height, width), normalised, of whole mask units.
        keep_BV: Row-major indices of the mask units to keep.
        q_pool: Stages that begin by pooling: Hiera is pre-trained with one fewer than it is used with, so that a mask
            unit ends as 2 x 2 tokens. No parameter depends on it.
        wanted: Blocks (from 1) whose queries and keys are returned.
        whole: Also run what follows the deepest of these.

    Returns:
        Maps of the stages, (B, V, rows, columns, D) by mask unit; and block -> Q and K, each (B * W, H, n, C), where W
        is the number of windows, one if attention is global.
    """
    size = images.shape[-2:]
    rows, columns = (side // unit_side(model) for side in size)
    seen_BU = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
    seen_BU = seen_BU.scatter(1, keep_BV, True).view(-1, 1, rows, columns)
    pixels = seen_BU.repeat_interleave(unit_side(model), 2).repeat_interleave(unit_side(model), 3)
    unroll, reroll = _order(model, size, q_pool)
    x_BND = unroll(model.patch_embed(images * pixels) + position(model, _grid(model, size)))
    x = x_BND.unflatten(1, (model.mu_size, rows * columns))  # unrolled, the unit is the last part of a token's place
    x_BND = x.gather(2, keep_BV[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])).flatten(1, 2)

    maps, found, pooled = [], {}, [end + 1 for end in model.stage_ends[:q_pool]]
    for i, block in enumerate(model.blocks if whole else model.blocks[: max(wanted)]):
        windows = block.attn.windows(x_BND.shape[1])
        pool = block.attn.q_stride if i in pooled else 1
        if not whole and i + 1 == max(wanted):
            x_BND, q, k = block.attn.attend(block.norm1(x_BND), pool)
        else:
            x_BND, q, k = recompute(model, run_block, block, x_BND, pool)
        if i + 1 in wanted:
            heads = block.attn.heads
            found[i + 1] = tuple(x.unflatten(1, (heads, windows)).transpose(1, 2).flatten(0, 1) for x in (q, k))
        if i in model.stage_ends:
            maps.append(reroll(x_BND, i, mask=keep_BV))
    return maps, found  # type: ignore[return-value]


def tokens_seen(model: Any, block: int, q_pool: int) -> tuple[int, int, bool]:
    """Queries and keys of a mask unit in a block (from 1), and whether attention stays within windows."""
    starts = [end + 2 for end in model.stage_ends[:q_pool]]  # the blocks that pool
    pool, attn = model.q_stride[0] * model.q_stride[1], model.blocks[block - 1].attn
    keys = model.mu_size // pool ** sum(start < block for start in starts)
    return keys // (pool if block in starts else 1), keys, attn.use_mask_unit_attn


def run_block(block: Any, x_BND: Tensor, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """timm's ``HieraBlock`` with another number of tokens per pool; returns its output, Q and K of the attention."""
    y_BND = block.norm1(x_BND)
    if block.do_expand:
        pools = (x_BND if block.proj is None else block.proj(y_BND)).unflatten(1, (pool, -1))
        x_BND = pools.amax(1) if block.proj is not None else torch.cat([pools.amax(1), pools.mean(1)], dim=-1)
    y_BND, q, k = block.attn.attend(y_BND, pool)
    x_BND = x_BND + block.drop_path1(block.ls1(y_BND))
    return x_BND + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BND)))), q, k


def adapt(model: Any, state: dict[str, Tensor], size: tuple[int, int] | None) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors with positions resized to this model's grid, and the names of those that were resized.

    Args:
        model: timm's Hiera.
        state: Tensors under timm's names.
        size: Height and width (pixels) of the file's model; None: unknown.

    Raises:
        CheckpointError: positions on a grid that is neither stored nor square.
    """
    own, pos = model.state_dict().get("pos_embed"), state.get("pos_embed")
    if own is None or pos is None or pos.ndim != 3 or (own.shape == pos.shape and size is None):
        return state, []
    new, unit, stride = tuple(model.tokens_spatial_shape), unit_side(model), model.patch_stride[0]
    side = round(pos.shape[1] ** 0.5)
    size = size or (side * stride, side * stride)
    old = (-(-size[0] // unit) * unit // stride, -(-size[1] // unit) * unit // stride)
    if old[0] * old[1] != pos.shape[1]:
        raise CheckpointError(
            f"the file's grid is unknown ({pos.shape[1]} positions)",
            "it is not square, and only our own files store their image size",
            "give a file written by tinymim, or one of a square size",
        )
    if old == new:
        return state, []
    return state | {"pos_embed": resize_position(pos, old, new, 0)}, ["pos_embed"]
