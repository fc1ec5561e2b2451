"""Modules that turn a model into the graph to export: exact at every size, with named inner tensors.

Legend: N = batch, D = width, C = classes, H, W = pixels, h, w = a feature map's sides.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.models import Backbone


def pool_matrix(bins: int, length: int, device: torch.device) -> Tensor:
    """Rows average the intervals of torch's adaptive pooling: bin i covers floor(i L / bins) .. ceil((i + 1) L / bins).

    Args:
        bins: Output length.
        length: Input length L; may be symbolic during export.

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


class WholeUpsample(nn.Module):
    """MMSegmentation's ``Upsample`` by an integer factor; the original exports the traced size as a constant."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.factor for side in x.shape[-2:]]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def make_exportable(model: nn.Module) -> int:
    """Replace modules that export wrongly for dynamic sizes (in place; weights stay); return how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _exportable(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                count += 1
    return count


def _exportable(module: Any) -> nn.Module | None:
    """The replacement of a module; None if it needs none."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return MatmulAvgPool2d(module.output_size)
    if type(module).__module__ == "mmseg.models.utils.wrappers":  # its Upsample
        factor = module.scale_factor
        if isinstance(factor, float) and factor.is_integer():
            return WholeUpsample(int(factor), module.mode, module.align_corners)
    return None


class FeatureGraph(nn.Module):
    """A bare backbone: image -> ``features`` (N, D, ceil(H/stride), ceil(W/stride)), its final features as a map."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"features": self.model.forward_map(image)}


class ClassifierGraph(nn.Module):
    """A classifier: image -> ``class_logits`` (N, K)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"class_logits": self.model(image)}


class SwapChannels(nn.Module):
    """A graph for RGB around one for BGR, or the other way round."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: Tensor) -> Any:
        return self.inner(image[:, [2, 1, 0]])


def as_list(features: Any) -> list[Tensor]:
    """The output of a backbone or neck, one tensor or several, as a list."""
    return [features] if isinstance(features, Tensor) else list(features)


class PyramidGraph(nn.Module):
    """Backbone and pyramid: image -> ``tap0..`` (inputs of the pyramid) -> ``level0..`` (inputs of the head).

    The pyramid is that of ``TinyMIMBackbone``, MMSegmentation's neck, or both; without one there are levels only.

    Args:
        model: An ``EncoderDecoder``, or a backbone alone.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = getattr(model, "backbone", model)
        self.neck = model.neck if getattr(model, "with_neck", False) else None
        self.own = bool(getattr(self.backbone, "fpn_names", ()))
        self.has_pyramid = self.own or self.neck is not None

    def trunk(self, image: Tensor) -> Any:
        """The inputs of the pyramid: one tensor or several."""
        return self.backbone.trunk(image) if self.own else self.backbone(image)

    def pyramid(self, taps: Any, image: Tensor) -> Any:
        """The levels: one tensor or several."""
        levels = self.backbone.pyramid(taps, image.shape[-2:]) if self.own else taps
        return levels if self.neck is None else self.neck(levels)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        taps = self.trunk(image)
        return self.name(taps, self.pyramid(taps, image))

    def name(self, taps: Any, levels: Any) -> dict[str, Tensor]:
        """Taps and levels by name."""
        out = {f"tap{i}": tap for i, tap in enumerate(as_list(taps))} if self.has_pyramid else {}
        return out | {f"level{i}": level for i, level in enumerate(as_list(levels))}


class SegmentorGraph(nn.Module):
    """The whole segmentor: image -> ``logits`` (N, C, H, W) at input size, or ``mask`` uint8 (N, H, W).

    ``scores`` is the head's output before up-sampling, usually at a quarter of the input size. Taps and levels that the
    head does not read are left out (``unread``), so that the exporter does not compute them.
    """

    def __init__(self, model: Any, output: str, unread: Collection[str] = ()) -> None:
        super().__init__()
        self.levels, self.head = PyramidGraph(model), model.decode_head
        self.output, self.unread = output, frozenset(unread)

    def scores(self, levels: Any) -> Tensor:
        """The head's scores; heads with a second output besides the classes (EncHead, DAHead) return a tuple."""
        scores = self.head(levels)
        return scores if isinstance(scores, Tensor) else scores[0]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        taps = self.levels.trunk(image)
        levels = self.levels.pyramid(taps, image)
        out = {name: value for name, value in self.levels.name(taps, levels).items() if name not in self.unread}
        out["scores"] = self.scores(levels)
        out["logits"] = F.interpolate(
            out["scores"], size=image.shape[-2:], mode="bilinear", align_corners=self.head.align_corners
        )
        if self.output == "mask":
            out["mask"] = decide(out["logits"], self.head)
        return out


def decide(logits_NCHW: Tensor, head: Any) -> Tensor:
    """Class ids uint8 (N, H, W) as in MMSegmentation: argmax, or the head's threshold if there is one channel."""
    if logits_NCHW.shape[1] == 1:
        return (logits_NCHW[:, 0].sigmoid() > head.threshold).to(torch.uint8)
    return logits_NCHW.argmax(dim=1).to(torch.uint8)
