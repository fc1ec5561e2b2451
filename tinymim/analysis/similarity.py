"""The outputs of blocks: similarity of two models by centred kernel alignment (CKA), effective rank.

Legend: B = photos of a batch, T = tokens, N = patches, D = width, L = blocks, P = B x B.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinymim.distill import read
from tinymim.errors import ConfigError
from tinymim.models.tokens import num_prefix

SMALLEST = 4  # photos of a batch: the unbiased estimate divides by B - 3
PART = 32  # photos that run at once
ROUNDING = 1e-10  # share of the squared features: below it, differences between photos are those of float32


@torch.no_grad()
def cka(
    model_a: Any,
    model_b: Any,
    images: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    blocks_a: Sequence[int] | None = None,
    blocks_b: Sequence[int] | None = None,
) -> Tensor:
    """Linear CKA of every pair of blocks, unbiased, accumulated over mini-batches.

    Source: Nguyen et al. (arXiv 2010.15327): the mean over batches of HSIC_1 of both, over the roots of the
    means of HSIC_1 of each with itself; HSIC_1 is the unbiased estimate of Song et al. (JMLR 13, 2012).

    The features of a photo are the output of a block (the residual stream), all its patch tokens flattened, as in
    Nguyen et al. and in MAE-Lite (arXiv 2205.14443; it reads them behind the next norm); prefix tokens are left out.
    Only products of photos with photos of the same model are compared, so that widths, patch sizes and numbers of
    tokens may differ. Photos that are alike in a batch (one class after the other) lower what there is to compare:
    shuffle them.

    Args:
        model_a: In evaluation mode; one of :data:`tinymim.distill.taps.TAPPABLE`, or a hierarchical backbone of ours,
            whose stages take the place of blocks.
        model_b: The same.
        images: One batch (B, 3, H, W), normalised for both models; or an iterable of batches, each such a tensor or a
            pair: the same photos in the same order, normalised and sized for ``model_a`` and for ``model_b``. At least
            4 photos a batch. Memory: the outputs of all chosen blocks for one batch.
        blocks_a: Blocks of ``model_a``, from 1; None: all.
        blocks_b: Blocks of ``model_b``.

    Returns:
        (len(blocks_a), len(blocks_b)), float32: 1 for features that are equal up to rotation and scale, about 0 for
        independent ones (a little below 0 is possible); NaN where all photos give the same features.

    Raises:
        ConfigError: no images, a batch of fewer than 4, pairs of unequal length, no such block, or a model that cannot
            be read.
    """
    chosen_a, chosen_b = (
        list(range(1, count_outputs(model) + 1) if blocks is None else blocks)
        for model, blocks in ((model_a, blocks_a), (model_b, blocks_b))
    )
    if not (chosen_a and chosen_b):
        raise ConfigError(
            "no blocks to compare",
            "a list of blocks is empty, or a model has no blocks",
            "name blocks from 1, or leave the list out; compare vision transformers",
        )
    both, own_a, own_b = (
        torch.zeros(shape, dtype=torch.float64)
        for shape in ((len(chosen_a), len(chosen_b)), (len(chosen_a), 1), (1, len(chosen_b)))
    )
    count = 0
    for batch in (images,) if isinstance(images, Tensor) else images:
        for_a, for_b = (batch, batch) if isinstance(batch, Tensor) else batch
        count = len(for_a)
        if count < SMALLEST or len(for_b) != count:
            raise ConfigError(
                f"a batch of {count} and {len(for_b)} photos",
                f"both models need the same photos, {SMALLEST} at least",
                "use larger batches and leave an incomplete last one out",
            )
        a_LP, b_LP = centred_grams(model_a, for_a, chosen_a), centred_grams(model_b, for_b, chosen_b)
        pairs = count * (count - 3)
        both += a_LP @ b_LP.T / pairs
        own_a += a_LP.square().sum(1, keepdim=True) / pairs
        own_b += b_LP.square().sum(1)[None] / pairs
    if not count:
        raise ConfigError("no images", "CKA compares photos", "give (B, 3, H, W), or batches of them")
    return (both / (own_a * own_b).sqrt()).float()


def is_hierarchical(model: Any) -> bool:
    """Whether a backbone has several stages; they take the place of blocks here."""
    return len(getattr(model, "stage_info", ())) > 1


def count_outputs(model: Any) -> int:
    """Blocks of a plain model, stages of a hierarchical one."""
    return len(model.stage_info) if is_hierarchical(model) else len(getattr(model, "blocks", ()))


def outputs(model: Any, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Block (from 1), or stage of a hierarchical model -> its patch tokens (B, N, D), without prefix tokens.

    Raises:
        ConfigError: no such block, or a model that cannot be read.
    """
    if is_hierarchical(model):
        maps = model.forward_intermediates(images, indices=[block - 1 for block in blocks], intermediates_only=True)
        return {block: x_BDHW.flatten(2).transpose(1, 2) for block, x_BDHW in zip(sorted(blocks), maps, strict=True)}
    taps = read(model, images, {block: ("output",) for block in blocks})
    return {block: taps[block]["output"][:, num_prefix(model) :] for block in blocks}


@torch.no_grad()
def effective_rank(model: Any, images: Tensor | Iterable[Tensor], *, blocks: Sequence[int] | None = None) -> Tensor:
    """Effective rank of the patch tokens after every block: how many directions they use.

    Source: Roy and Vetterli, EUSIPCO 2007: exp of the entropy of the singular values, normalised to sum 1, here of all
    patch tokens of all photos less their mean.

    Args:
        model: As for :func:`cka`.
        images: (B, 3, H, W), normalised for this model; or an iterable of such batches.
        blocks: From 1; None: all.

    Returns:
        (len(blocks),), float32: 1 for tokens on a line, at most the width.

    Raises:
        ConfigError: no images, no such block, or a model that cannot be read.
    """
    chosen = list(range(1, count_outputs(model) + 1) if blocks is None else blocks)
    sums: dict[int, list[Tensor]] = {}
    for batch in (images,) if isinstance(images, Tensor) else images:
        for part in batch.split(PART):
            for block, x_BND in outputs(model, part, chosen).items():
                x_ND = x_BND.flatten(0, 1).double()
                found = [torch.tensor(float(len(x_ND))), x_ND.sum(0), x_ND.T @ x_ND]
                sums[block] = [a + b for a, b in zip(sums[block], found, strict=True)] if block in sums else found
    if not sums:
        raise ConfigError("no images", "the rank is that of tokens of photos", "give (B, 3, H, W), or batches of them")
    ranks = []
    for block in chosen:
        count, total_D, product_DD = sums[block]
        covariance_DD = product_DD / count - torch.outer(total_D / count, total_D / count)
        sizes_D = torch.linalg.eigvalsh(covariance_DD.cpu()).clamp_min(0).sqrt()
        ranks.append(
            torch.special.entr(sizes_D / sizes_D.sum()).sum().exp() if sizes_D.sum() > 0 else torch.tensor(1.0)
        )
    return torch.stack([rank.float() for rank in ranks])


def centred_grams(model: Any, images: Tensor, blocks: Sequence[int]) -> Tensor:
    """U-centred Gram matrices of the outputs of blocks, flattened: (L, P), float64 on the CPU.

    HSIC_1 is the product of two such matrices over B (B - 3) (Szekely and Rizzo, arXiv 1310.2926: U-centring is a
    projection), so CKA never exceeds 1.
    """
    parts = [outputs(model, part, blocks) for part in images.split(PART)]
    grams = []
    for block in blocks:
        x_BF = torch.cat([found[block].flatten(1).float() for found in parts])
        size = x_BF.square().sum(1).max()
        x_BF = x_BF - x_BF.mean(0)  # changes nothing but rounding
        gram_BB = x_BF @ x_BF.T
        if gram_BB.diagonal().max() <= ROUNDING * size:
            gram_BB = torch.zeros_like(gram_BB)
        grams.append(u_centred(gram_BB.double().cpu()).flatten())
    return torch.stack(grams)


def u_centred(gram_BB: Tensor) -> Tensor:
    """A Gram matrix without its diagonal, its rows and columns summing to 0 (Szekely and Rizzo)."""
    count = len(gram_BB)
    gram_BB = gram_BB - torch.diag(gram_BB.diagonal())
    rows_B1 = gram_BB.sum(1, keepdim=True) / (count - 2)
    centred_BB = gram_BB - rows_B1 - rows_B1.T + gram_BB.sum() / ((count - 1) * (count - 2))
    return centred_BB - torch.diag(centred_BB.diagonal())
