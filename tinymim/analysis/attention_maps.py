"""The attention maps of a vision transformer: how far its heads look, and at how many tokens.

Maps are held in parts: memory is linear in the tokens.

Legend: B = batch, T = tokens, N = patches, R = some of the query rows, H = heads, L = blocks.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tinymim.distill import read, relation_logits
from tinymim.errors import ConfigError
from tinymim.models.tokens import num_heads, num_prefix, patch_grid, patch_size

PART, VALUES = 8, 1 << 23  # images whose q and k are held at once, and values of their attention maps


def check_maps(model: Any) -> None:
    """Refuse a model whose attention maps cannot be computed from its queries and keys.

    Raises:
        ConfigError: it is neither our ViT nor a timm model whose attention adds nothing to its scores.
    """
    if not (hasattr(model, "attention_bias") or isinstance(model, VisionTransformer | Eva)):
        raise ConfigError(
            f"cannot compute the attention maps of a {type(model).__name__}",
            "it adds a bias to its scores, which cannot be read",
            "use one of ViT, VisionTransformer, Eva",
        )


def log_maps(model: Any, images: Tensor, first: int = 0) -> Iterator[tuple[int, slice, Tensor]]:
    """Logarithms of the attention maps among the tokens from ``first`` on, part by part.

    Args:
        model: Our ViT, or a timm model whose attention adds nothing to its scores (VisionTransformer, Eva).
        images: (B, 3, H, W), normalised for this model.
        first: Tokens before it are left out as queries and keys; the softmax is over the others.

    Yields:
        Block (from 1), the query rows counted from ``first``, and their log-probabilities (B', H, R, T - first).

    Raises:
        ConfigError: see :func:`check_maps`.
    """
    check_maps(model)
    grid = patch_grid(model, (images.shape[2], images.shape[3]))
    wanted = {block: ("q", "k") for block in range(1, len(model.blocks) + 1)}
    for part in images.split(PART):
        for block, taps in read(model, part, wanted).items():
            bias_1HTT = model.attention_bias(block - 1, grid) if hasattr(model, "attention_bias") else None
            q_BTD, k_BTD = taps["q"][:, first:], taps["k"][:, first:]
            tokens = q_BTD.shape[1]
            step = max(VALUES // (len(part) * num_heads(model) * tokens), 1)
            for start in range(0, tokens, step):
                rows = slice(start, start + step)
                scores_BHRT = relation_logits(q_BTD[:, rows], k_BTD, num_heads(model))
                if bias_1HTT is not None:
                    scores_BHRT = scores_BHRT + bias_1HTT[:, :, first:, first:][:, :, rows]
                yield block, rows, scores_BHRT.log_softmax(-1)


@torch.no_grad()
def attention_stats(model: Any, images: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean attention distance and entropy of every head, among the patch tokens.

    The class token and other prefix tokens are left out as queries and as keys, and the maps are normalised again over
    the patches. Distance (Dosovitskiy et al., arXiv 2010.11929, figure 7; Raghu et al., arXiv 2108.08810): the distance
    between the centres of query and key in pixels of ``images``, from the model's own patch size, weighted by
    attention. Entropy: 0 where a patch attends to one patch, log N where it attends to all N equally. Both are means
    over queries and photos; a head of a model with another patch size has another grid, so compare entropies of
    different models at equal grids.

    Args:
        model: In evaluation mode; our ViT, or a timm model whose attention adds nothing to its scores
            (VisionTransformer, Eva).
        images: (B, 3, H, W), normalised for this model; or an iterable of such batches, of any sizes.

    Returns:
        ``distance``: (L, H) in pixels, and ``entropy``: (L, H) in nats, float32.

    Raises:
        ConfigError: no images, or see :func:`check_maps`.
    """
    check_maps(model)
    shape, prefix, count = (len(model.blocks), num_heads(model)), num_prefix(model), 0
    total = {name: torch.zeros(shape, dtype=torch.float64) for name in ("distance", "entropy")}
    for batch_BCHW in (images,) if isinstance(images, Tensor) else images:
        grid = patch_grid(model, (batch_BCHW.shape[2], batch_BCHW.shape[3]))
        apart_NN = patch_size(model) * patch_distances(grid).to(batch_BCHW.device)
        for block, rows, log_BHRN in log_maps(model, batch_BCHW, prefix):
            map_BHRN = log_BHRN.exp()
            for name, weight in (("distance", apart_NN[rows]), ("entropy", -log_BHRN)):
                total[name][block - 1] += (map_BHRN * weight).sum((0, 2, 3)).double().cpu() / math.prod(grid)
        count += len(batch_BCHW)
    if not count:
        raise ConfigError("no images", "attention is measured on photos", "give (B, 3, H, W), or batches of them")
    return {name: (sum_LH / count).float() for name, sum_LH in total.items()}


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Distances between the patches of a grid (rows, columns), in patches: (N, N)."""
    at_N2 = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    return torch.linalg.vector_norm(at_N2[:, None] - at_N2, dim=-1)
