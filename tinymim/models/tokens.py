"""Facts about a vision transformer (heads, patches, prefix tokens), and selecting, pairing and resizing its tokens.

Legend: B = batch, T = tokens, N = patches, V = visible patches, P = prefix tokens, D = width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

from tinymim.errors import ConfigError


def num_heads(model: Any) -> int:
    """Attention heads per block."""
    return int(model.blocks[0].attn.num_heads)


def patch_size(model: Any) -> int:
    """Side of a patch in pixels."""
    patch = model.patch_embed.patch_size
    return int(patch if isinstance(patch, int) else patch[0])


def patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of ``size`` (height, width) pixels."""
    return -(-size[0] // patch_size(model)), -(-size[1] // patch_size(model))


def num_prefix(model: Any) -> int:
    """Tokens before the patches: class, distillation, registers."""
    return 0 if isinstance(model, VisionTransformerSAM) else int(getattr(model, "num_prefix_tokens", 1))


def has_class_token(model: Any) -> bool:
    """Whether the first token is a class token."""
    return getattr(model, "cls_token", None) is not None


def pair_tokens(x_BTD: Tensor, model: Any, class_token: bool) -> Tensor:
    """The tokens that are compared: the class token if ``class_token``, then the patches; registers are dropped."""
    patches = x_BTD[:, num_prefix(model) :]
    if num_prefix(model) == int(class_token):
        return x_BTD
    return torch.cat([x_BTD[:, :1], patches], dim=1) if class_token else patches


def keep_patches(x_BTD: Tensor, keep_BV: Tensor, prefix: int) -> Tensor:
    """Keep the prefix tokens and the chosen patches: (B, P + N, D) -> (B, P + V, D)."""
    patches = x_BTD[:, prefix:].gather(1, keep_BV.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
    return torch.cat([x_BTD[:, :prefix], patches], dim=1)


def resample(x_BTD: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Resize the patch tokens of a square grid to another grid (bilinear); prefix tokens are kept.

    Raises:
        ConfigError: the number of patches is not a square.
    """
    patches = x_BTD[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ConfigError(
            f"{patches.shape[1]} teacher tokens do not form a square grid",
            "their rows and columns are unknown",
            "use square crops",
        )
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False, antialias=True)
    return torch.cat([x_BTD[:, :prefix], maps.flatten(2).transpose(1, 2)], dim=1)
