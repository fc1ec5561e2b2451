"""timm's TinyViT (arXiv 2207.10666) on images of any size, in graphs that are right at every size.

Windows are padded with zeros, without a mask, as in timm and in the authors' code
(https://github.com/microsoft/Cream, MIT).

Legend: B = batch, D = width, H, W = a map's rows and columns.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinymim.models.hiera import recompute

TABLE = "attention_biases"  # (heads, window * window): a bias for every distance in rows and columns
AUTHORS = (  # their names -> timm's
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"\.c\.weight$", ".conv.weight"),
)


def run_tinyvit(model: Any, images: Tensor, stages: int) -> list[Tensor]:
    """Images (B, 3, height, width) -> maps (B, D, H, W) of the first stages."""
    forget_biases(model)
    x_BDHW, maps = model.patch_embed(images), []
    for i, stage in enumerate(model.stages[:stages]):
        if i == 0:  # convolutions
            for block in stage.blocks:
                x_BDHW = recompute(model, block, x_BDHW)
        else:
            x_BHWD = stage.downsample(x_BDHW).permute(0, 2, 3, 1)
            for block in stage.blocks:
                x_BHWD = recompute(model, as_function(block), x_BHWD)
            x_BDHW = x_BHWD.permute(0, 3, 1, 2).contiguous()
        maps.append(x_BDHW)
    forget_biases(model)
    return maps


def as_function(block: Any) -> Callable[[Tensor], Tensor]:
    """A block of windowed attention as a function (B, H, W, D) -> the same; without timm's branches on the size, so
    that one traced graph is right at every size.
    """

    def run(x_BHWD: Tensor) -> Tensor:
        B, H, W, D = x_BHWD.shape
        side = block.window_size
        rows, columns = (H + side - 1) // side, (W + side - 1) // side
        x = F.pad(x_BHWD, (0, 0, 0, columns * side - W, 0, rows * side - H))
        x = x.reshape(B, rows, side, columns, side, D).transpose(2, 3).reshape(-1, side * side, D)
        x = block.attn(x).reshape(B, rows, columns, side, side, D).transpose(2, 3)
        x = x.reshape(B, rows * side, columns * side, D)[:, :H, :W]
        x = x_BHWD + block.drop_path1(x)
        x = block.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + block.drop_path2(block.mlp(x))

    return run


def forget_biases(model: Any) -> None:
    """Clear timm's cache of each block's bias table, which breaks copies, traced graphs and gradients."""
    for stage in model.stages[1:]:
        for block in stage.blocks:
            block.attn.attention_bias_cache = {}


def adapt(model: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors under timm's names, with tables resized to this model's windows, and the names of these.

    Tables are resized as the authors do: bicubic, without antialiasing.

    Args:
        model: timm's TinyVit.
        state: Tensors under timm's names or the authors', who merge patches at the end of a stage.
    """
    if any(key.startswith("patch_embed.seq.") for key in state):
        state = {_renamed(key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.endswith("attention_bias_idxs")}
    resized = []
    for name, own in model.state_dict().items():
        table = state.get(name)
        if not name.endswith(TABLE) or table is None or table.ndim != 2 or table.shape == own.shape:
            continue
        old, new = (math.isqrt(each.shape[1]) for each in (table, own))
        if table.shape == (len(own), old * old):
            square = table.float().reshape(1, -1, old, old)
            state[name] = F.interpolate(square, size=(new, new), mode="bicubic").reshape(own.shape).to(table.dtype)
            resized.append(name)
    return state, resized


def _renamed(key: str) -> str:
    for pattern, text in AUTHORS:
        key = re.sub(pattern, text, key)
    key = re.sub(r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
    return re.sub(r"^layers\.", "stages.", key)
