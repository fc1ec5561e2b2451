"""timm's Swin Transformer (arXiv 2103.14030) on images of any size, in graphs that are right at every size.

The same numbers as timm's ``dynamic_img_size``: windows and shifts are those of the size the model was built for, maps
are padded with zeros to whole windows after the shift, and the mask of shifted windows is computed for the map at hand.

Legend: B = batch, H, W = a map's rows and columns, w = windows, N = tokens of a window, D = width, h = heads,
C = channels per head.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinymim.models.hiera import recompute
from tinymim.models.position import resize_relative_table

TABLE = "relative_position_bias_table"
Pair = tuple[int, int]


def blocks_of(model: Any) -> list[Any]:
    """All blocks in order."""
    return [block for stage in model.layers for block in stage.blocks]


def embed(model: Any, images: Tensor) -> Tensor:
    """Images (B, 3, height, width) of whole patches -> (B, H, W, D)."""
    return model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1))


def split_windows(x_BHWD: Tensor, window: Pair, shift: Pair) -> Tensor:
    """A map, shifted and padded with zeros to whole windows -> (B, w, N, D)."""
    B, H, W, D = x_BHWD.shape
    rows, columns = (H + window[0] - 1) // window[0], (W + window[1] - 1) // window[1]
    if any(shift):
        x_BHWD = torch.roll(x_BHWD, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    x = F.pad(x_BHWD, (0, 0, 0, columns * window[1] - W, 0, rows * window[0] - H))
    x = x.reshape(B, rows, window[0], columns, window[1], D).transpose(2, 3)
    return x.reshape(B, rows * columns, window[0] * window[1], D)


def merge_windows(x_BwND: Tensor, window: Pair, shift: Pair, size: Pair) -> Tensor:
    """The inverse of :func:`split_windows` for a map of ``size`` rows and columns."""
    B, _, _, D = x_BwND.shape
    rows, columns = (size[0] + window[0] - 1) // window[0], (size[1] + window[1] - 1) // window[1]
    x = x_BwND.reshape(B, rows, columns, window[0], window[1], D).transpose(2, 3)
    x = x.reshape(B, rows * window[0], columns * window[1], D)[:, : size[0], : size[1]]
    return torch.roll(x, shifts=shift, dims=(1, 2)) if any(shift) else x


def shift_mask(size: Pair, window: Pair, shift: Pair, like: Tensor) -> Tensor:
    """-100 between tokens of a window that lie on different sides of the image's edge, else 0: (w, 1, N, N)."""
    regions = []
    for side, each, moved in zip(size, window, shift, strict=True):
        whole = (side + each - 1) // each * each
        at = torch.arange(whole, device=like.device)
        regions.append((at >= whole - each).to(like.dtype) + (at >= whole - moved).to(like.dtype))
    region_HW = 3 * regions[0][:, None] + regions[1][None, :]
    region_wN = split_windows(region_HW[None, :, :, None], window, (0, 0))[0, :, :, 0]
    return ((region_wN[:, None, :] - region_wN[:, :, None]) != 0).to(like.dtype)[:, None] * -100.0


def heads_of(x_BwND: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, w, N, parts * h * C) -> ``parts`` tensors (B, w, h, N, C)."""
    return x_BwND.unflatten(3, (parts, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)


def run_block(block: Any, x_BHWD: Tensor) -> Tensor:
    """timm's ``SwinTransformerBlock``."""
    attn, window, shift = block.attn, block.window_size, block.shift_size
    size = (x_BHWD.shape[1], x_BHWD.shape[2])
    q, k, v = heads_of(attn.qkv(split_windows(block.norm1(x_BHWD), window, shift)), 3, attn.num_heads)
    scores = (q * attn.scale) @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
    if any(shift):
        scores = scores + shift_mask(size, window, shift, scores)
    x = attn.attn_drop(scores.softmax(-1)) @ v
    x = attn.proj_drop(attn.proj(x.transpose(2, 3).flatten(3)))
    x_BHWD = x_BHWD + block.drop_path1(merge_windows(x, window, shift, size))
    return x_BHWD + block.drop_path2(block.mlp(block.norm2(x_BHWD)))


def queries_and_keys(block: Any, x_BHWD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and K of a block's windows, each (B * w, h, N, C), and the bias (1, h, N, N) of its scores, from its input."""
    qkv = block.attn.qkv(split_windows(block.norm1(x_BHWD), block.window_size, block.shift_size))
    q, k, _ = heads_of(qkv, 3, block.attn.num_heads)
    return q.flatten(0, 1), k.flatten(0, 1), block.attn._get_rel_pos_bias()


def merge_patches(stage: Any, x_BHWD: Tensor) -> Tensor:
    """The start of a stage: 2 x 2 cells become one, padded with zeros; nothing in the first stage."""
    if not hasattr(stage.downsample, "reduction"):
        return x_BHWD
    B, H, W, D = x_BHWD.shape
    rows, columns = (H + 1) // 2, (W + 1) // 2
    x = F.pad(x_BHWD, (0, 0, 0, 2 * columns - W, 0, 2 * rows - H))
    x = x.reshape(B, rows, 2, columns, 2, D).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return stage.downsample.reduction(stage.downsample.norm(x))


def run_swin(model: Any, images: Tensor, stages: int) -> list[Tensor]:
    """Images of whole patches -> maps (B, D, H, W) of the first stages, without norm."""
    x_BHWD, maps = embed(model, images), []
    for stage in model.layers[:stages]:
        x_BHWD = merge_patches(stage, x_BHWD)
        for block in stage.blocks:
            x_BHWD = recompute(stage, run_block, block, x_BHWD)
        maps.append(x_BHWD.permute(0, 3, 1, 2).contiguous())
    return maps


def adapt(model: Any, state: dict[str, Tensor], windows: list[Pair] | None) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors under timm's names, with tables resized to this model's windows, and the names of these.

    Args:
        model: timm's SwinTransformer.
        state: Tensors under timm's names or the authors', who merge patches at the end of a stage.
        windows: The window of every block of the file's model; None: unknown, they are square.
    """
    if "layers.0.downsample.reduction.weight" in state:  # the authors' names
        moved = re.compile(r"^layers\.(\d)\.downsample\.")
        state = {moved.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample.", key): x for key, x in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith(("relative_position_index", "attn_mask"))}
    names = [f"layers.{i}.blocks.{j}.attn.{TABLE}" for i, s in enumerate(model.layers) for j in range(len(s.blocks))]
    resized = []
    for number, (name, block) in enumerate(zip(names, blocks_of(model), strict=True)):
        table = state.get(name)
        if table is None or table.ndim != 2:
            continue
        side = (round(len(table) ** 0.5) + 1) // 2
        old = windows[number] if windows else (side, side)
        if old != tuple(block.window_size) and len(table) == (2 * old[0] - 1) * (2 * old[1] - 1):
            state[name] = resize_relative_table(table, old, tuple(block.window_size))
            resized.append(name)
    return state, resized
