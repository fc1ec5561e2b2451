"""Modules that turn a model into the graph to export: pooling that is exact at every size, named inner tensors.

Legend: N = batch, D = width, C = classes, H, W = pixels, h, w = a feature map's sides.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.models import ViT


def pool_matrix(bins: int, length: int, device: torch.device) -> Tensor:
    """Rows average the intervals of torch's adaptive pooling: bin i covers floor(i L / bins) .. ceil((i + 1) L / bins).

    Args:
        bins: Output length.
        length: Input length L; may be symbolic under export.

    Returns:
        float32 (bins, L): 1 / count inside the interval, 0 outside.
    """
    i = torch.arange(bins, device=device)
    start = i * length // bins
    end = ((i + 1) * length + bins - 1) // bins
    at = torch.arange(length, device=device)
    inside = (at >= start[:, None]) & (at < end[:, None])
    return inside.float() / (end - start)[:, None].float()


class MatmulAvgPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, exact at every input size: (N, D, h, w) -> (N, D, a, b)."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        both = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
        self.bins = tuple(both)

    def forward(self, x: Tensor) -> Tensor:
        for axis, bins in zip((-2, -1), self.bins, strict=True):
            if bins is None:  # torch: keep this side
                continue
            weights = pool_matrix(bins, x.shape[axis], x.device).to(x.dtype)
            x = torch.matmul(weights, x) if axis == -2 else torch.matmul(x, weights.transpose(0, 1))
        return x


def replace_pooling(model: nn.Module) -> int:
    """Swap every ``AdaptiveAvgPool2d`` inside ``model`` (in place; no weights are touched); return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, MatmulAvgPool2d(child.output_size))
                count += 1
    return count


class FeatureGraph(nn.Module):
    """A bare ViT: image -> ``features`` (N, D, ceil(H/patch), ceil(W/patch)), patch tokens after the final norm."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        patch = self.vit.patch_size
        grid = [(side + patch - 1) // patch for side in image.shape[-2:]]
        return {"features": self.vit(image)[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)}


class PyramidGraph(nn.Module):
    """Backbone and pyramid: image -> ``tap0..`` (the ViT's blocks) -> ``level0..`` (strides 4, 8, 16, 32)."""

    def __init__(self, backbone: nn.Module, neck: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def trunk(self, image: Tensor) -> list[Tensor]:
        """What the pyramid starts from."""
        from tinymim.seg import TinyMIMBackbone

        if isinstance(self.backbone, TinyMIMBackbone):
            return self.backbone.forward_intermediates(
                image, indices=self.backbone.out_indices, stop_early=True, intermediates_only=True
            )
        return list(self.backbone(image))

    def pyramid(self, taps: list[Tensor], image: Tensor) -> list[Tensor]:
        """The levels the head reads; the same arithmetic as ``TinyMIMBackbone.forward``, held to it by verification."""
        from tinymim.seg import TinyMIMBackbone

        levels = taps
        if isinstance(self.backbone, TinyMIMBackbone):
            sides, bb = image.shape[-2:], self.backbone
            levels = [fpn(tap) for fpn, tap in zip((bb.fpn1, bb.fpn2, bb.fpn3, bb.fpn4), taps, strict=True)]
            for i, stride in enumerate((4, 8)):  # the padding of a ragged image; 16 and 32 have the right size already
                levels[i] = levels[i][..., : (sides[0] + stride - 1) // stride, : (sides[1] + stride - 1) // stride]
        return levels if self.neck is None else list(self.neck(tuple(levels)))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        taps = self.trunk(image)
        levels = self.pyramid(taps, image)
        out = {f"tap{i}": tap for i, tap in enumerate(taps)}
        return out | {f"level{i}": level for i, level in enumerate(levels)}


class SegmentorGraph(nn.Module):
    """The whole segmentor: image -> ``logits`` (N, C, H, W) at input size, or ``mask`` uint8 (N, H, W).

    ``scores`` is what the head gives, a quarter of the input size, before up-sampling.
    """

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.levels = PyramidGraph(model.backbone, model.neck if model.with_neck else None)
        self.head, self.output = model.decode_head, output

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        out = self.levels(image)
        levels = [value for name, value in out.items() if name.startswith("level")]
        out["scores"] = self.head(levels)
        out["logits"] = F.interpolate(
            out["scores"], size=image.shape[-2:], mode="bilinear", align_corners=self.head.align_corners
        )
        if self.output == "mask":
            out["mask"] = decide(out["logits"], self.head)
        return out


def decide(logits_NCHW: Tensor, head: Any) -> Tensor:
    """Class ids uint8 (N, H, W) as MMSegmentation decides: argmax, or the threshold where there is one channel."""
    if logits_NCHW.shape[1] == 1:
        return (logits_NCHW[:, 0].sigmoid() > head.threshold).to(torch.uint8)
    return logits_NCHW.argmax(dim=1).to(torch.uint8)
