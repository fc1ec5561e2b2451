"""Colour jitter: drawn for each photo by the data workers, applied there by Pillow or here to a batch on any device.

Both give the same pixels. Source: TinyMIM's code (strength 0.4, always applied, no hue); it is not in the paper's main
text.

Legend: B = batch, S = side of a crop.
"""

import random

import torch
from torch import Tensor

CHANGES = ("Brightness", "Contrast", "Color")  # classes of Pillow's ImageEnhance
GREY = (19595, 38470, 7471)  # 2**16 times the weights of Pillow's conversion to grey (ITU-R 601-2)


def draw_jitter(strength: float, rng: random.Random) -> list[tuple[str, float]]:
    """The :data:`CHANGES` of a photo in random order, each with its factor in 1 +- strength."""
    changes = [*CHANGES]
    rng.shuffle(changes)
    return [(change, rng.uniform(max(0.0, 1 - strength), 1 + strength)) for change in changes]


def apply_jitter(images_B3SS: Tensor, jitter_B32: Tensor) -> Tensor:
    """Change the colours of each photo of a batch: to the last bit what Pillow does.

    Each change blends the photo with a plain one: black, its mean grey, or its grey picture. As in Pillow every result
    is cut to whole levels before the next change.

    Args:
        images_B3SS: uint8.
        jitter_B32: float32, in the order of :func:`draw_jitter`: position in :data:`CHANGES`, and factor.

    Returns:
        uint8 (B, 3, S, S).
    """
    images = images_B3SS.float()
    weights = torch.tensor(GREY, dtype=torch.float32, device=images.device).view(3, 1, 1)
    for change_B2 in jitter_B32.unbind(1):
        change, factor = (value.view(-1, 1, 1, 1) for value in change_B2.unbind(1))
        grey_B1SS = (((images * weights).sum(1, keepdim=True) + 2**15) / 2**16).floor_()
        mean_B111 = (grey_B1SS.mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor_().float()
        plain = torch.where(change == 2, grey_B1SS, torch.where(change == 1, mean_B111, 0.0))
        images = images.sub_(plain).mul_(factor).add_(plain).clamp_(0, 255).floor_()
    return images.to(torch.uint8)
