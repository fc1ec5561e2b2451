"""What a vision transformer shows: q, k, v of any block, computing nothing behind them.

Legend: B = batch, T = tokens, D = width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tinymim.errors import ConfigError
from tinymim.models.vit import ViT

TAPPABLE = (ViT, VisionTransformer, Beit)


def qkv_at(model: Any, images: Tensor, block: int) -> dict[str, Tensor]:
    """Run ``block - 1`` whole blocks, then norm1 and the q, k, v projection of block ``block`` (1-based), and stop.

    Args:
        model: Our ViT, or timm's VisionTransformer or BEiT.
        images: (B, 3, H, W), normalised for this model.
        block: 1-based block.

    Returns:
        ``q``, ``k``, ``v``, each (B, T, D), as they enter the dot product (after q/k norm, before any bias), class
        token first.

    Raises:
        ConfigError: another kind of model.
    """
    if isinstance(model, ViT):
        x_BTD, grid = model.embed(images)
        index_TT = model.bias_index(grid)
        for i in range(block - 1):
            x_BTD = model.run_block(i, x_BTD, grid, index_TT)
        last: Any = model.blocks[block - 1]
        return _split(last.attn.qkv(last.norm1(x_BTD)))
    if isinstance(model, Beit):
        x_BTD = model.patch_embed(images)
        x_BTD = torch.cat([model.cls_token.expand(x_BTD.shape[0], -1, -1), x_BTD], dim=1)
        if model.pos_embed is not None:
            x_BTD = x_BTD + model.pos_embed
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        for each in model.blocks[: block - 1]:
            x_BTD = each(x_BTD, shared_rel_pos_bias=bias)
        last = model.blocks[block - 1]
        attn = last.attn
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return _split(F.linear(last.norm1(x_BTD), attn.qkv.weight, bias))
    if isinstance(model, VisionTransformer):
        x_BTD = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for each in model.blocks[: block - 1]:
            x_BTD = each(x_BTD)
        last = model.blocks[block - 1]
        taps = _split(last.attn.qkv(last.norm1(x_BTD)))
        for name in ("q", "k"):
            norm = getattr(last.attn, f"{name}_norm", nn.Identity())
            if not isinstance(norm, nn.Identity):
                taps[name] = norm(taps[name].unflatten(2, (last.attn.num_heads, -1))).flatten(2)
        return taps
    raise ConfigError(
        f"cannot read q, k, v from a {type(model).__name__}",
        "taps exist for tinymim's ViT and timm's VisionTransformer and BEiT",
        "use one of these as teacher or student",
    )


def _split(qkv_BT3D: Tensor) -> dict[str, Tensor]:
    q, k, v = qkv_BT3D.chunk(3, dim=-1)
    return {"q": q, "k": k, "v": v}


def num_heads(model: Any) -> int:
    """Heads of the model's blocks."""
    return int(model.blocks[0].attn.num_heads)


def patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns the model makes of an image of ``size`` pixels."""
    patch = model.patch_embed.patch_size
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    return -(-size[0] // int(ph)), -(-size[1] // int(pw))


def num_prefix(model: Any) -> int:
    """Tokens before the patches."""
    return int(getattr(model, "num_prefix_tokens", 1))
