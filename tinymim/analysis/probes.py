"""Quality of frozen features: k-NN and a linear probe, fast enough to run during pre-training.

Legend: N = photos, D = width, C = classes, K = neighbours, L = blocks, T = tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinymim.analysis.similarity import is_hierarchical
from tinymim.distill import read
from tinymim.models.tokens import has_class_token, num_prefix

CHUNK = 1024  # validation photos compared at once


def trained_depth(model: Any) -> int:
    """The deepest block (from 1) whose every part is trained; the last block if there is none.

    TinyMIM's published form reads q, k, v of the last block: the parts after them keep their initial values, and
    :class:`tinymim.distill.TinyMIM` freezes them, so that block's output is noise and the one before is the deepest
    useful one. MAE trains all blocks; so do the methods of hierarchical students.
    """
    if is_hierarchical(model):
        return int(model.depth)
    whole = [i for i, block in enumerate(model.blocks, 1) if all(p.requires_grad for p in block.parameters())]
    return max(whole, default=int(model.depth))


@torch.no_grad()
def embed(model: Any, batches: Iterable[Tensor], block: int | None = None) -> Tensor:
    """Mean of the patch tokens after a block; of a hierarchical model, of its last map.

    Args:
        model: In evaluation mode.
        batches: (B, 3, H, W) each, normalised.
        block: From 1; None: :func:`trained_depth`.

    Returns:
        (N, D) float32, on the CPU.
    """
    if is_hierarchical(model):
        return torch.cat([model.forward_map(images).mean((2, 3)).float().cpu() for images in batches])
    at = block or trained_depth(model)
    tokens = (read(model, images, {at: ("output",)})[at]["output"] for images in batches)
    return torch.cat([x_BTD[:, model.num_prefix_tokens :].mean(1).float().cpu() for x_BTD in tokens])


@torch.no_grad()
def embed_blocks(model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The class token, and the mean of the patch tokens, after every block.

    Args:
        model: In evaluation mode; one of :data:`tinymim.distill.taps.TAPPABLE`.
        batches: (B, 3, H, W) each, normalised.

    Returns:
        ``class token`` (unless the model has none) and ``patches``: (L, N, D) each, float32, on the CPU.
    """
    wanted = {block: ("output",) for block in range(1, len(model.blocks) + 1)}
    found: dict[str, list[Tensor]] = {"class token": [], "patches": []}
    for images in batches:
        x_LBTD = torch.stack([taps["output"] for taps in read(model, images, wanted).values()]).float()
        found["class token"] += [x_LBTD[:, :, 0].cpu()] if has_class_token(model) else []
        found["patches"].append(x_LBTD[:, :, num_prefix(model) :].mean(2).cpu())
    return {name: torch.cat(parts, dim=1) for name, parts in found.items() if parts}


def knn_accuracy(
    features_train: Tensor,
    labels_train: Tensor,
    features_val: Tensor,
    labels_val: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 of a weighted k-NN vote: each neighbour votes with exp(cosine / temperature).

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; k = 20 is what DINO (arXiv 2104.14294) found best.

    Args:
        features_train: (N, D).
        labels_train: (N,) class ids from 0.
        features_val: (N_val, D).
        labels_val: (N_val,).
        k: Neighbours; all photos if there are fewer.
        temperature: Temperature of the votes.

    Returns:
        Share of correct predictions, 0 to 1.
    """
    train_ND, val_ND = F.normalize(features_train.float(), dim=1), F.normalize(features_val.float(), dim=1)
    votes_NC = F.one_hot(labels_train.long()).float()
    right = 0
    for own_BD, labels_B in zip(val_ND.split(CHUNK), labels_val.split(CHUNK), strict=True):
        cosine_BK, at_BK = (own_BD @ train_ND.T).topk(min(k, len(train_ND)))
        weight_BK = ((cosine_BK - 1) / temperature).exp()  # - 1: the largest exponent is 0
        guess_B = (weight_BK[..., None] * votes_NC[at_BK]).sum(1).argmax(1)
        right += int((guess_B == labels_B).sum())
    return right / len(val_ND)


def linear_probe(
    features_train: Tensor, labels_train: Tensor, features_val: Tensor, labels_val: Tensor, decay: float = 1e-3
) -> float:
    """Top-1 of a logistic regression on frozen features: standardised, full batch, L-BFGS; deterministic.

    Args:
        features_train: (N, D).
        labels_train: (N,) class ids from 0.
        features_val: (N_val, D).
        labels_val: (N_val,).
        decay: Factor of 0.5 |weights|^2, which is added to the mean cross entropy.

    Returns:
        Share of correct predictions, 0 to 1.
    """
    mean_D, std_D = features_train.float().mean(0), features_train.float().std(0, correction=0).clamp(min=1e-6)
    train_ND, val_ND = ((x.float() - mean_D) / std_D for x in (features_train, features_val))
    weight = torch.zeros(int(labels_train.max()) + 1, train_ND.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(train_ND, weight, bias), labels_train.long())
        value = value + 0.5 * decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    guess_N = F.linear(val_ND, weight, bias).argmax(1)
    return float((guess_N == labels_val).float().mean())
