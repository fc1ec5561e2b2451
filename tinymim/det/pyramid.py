"""Levels for a detector: ViTDet's simple pyramid of one map, or a feature pyramid network on four.

Legend: B = batch, D = width of a backbone's map, E = width of the levels, H, W = image height and width in pixels.
"""

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

LEVELS = ("0", "1", "2", "3")  # at strides 4, 8, 16 and 32
COARSEST = "pool"  # at stride 64, for anchors only


class SimplePyramid(nn.Module):
    """ViTDet (arXiv 2203.16527, section 3): the last map of a plain ViT, up and down to four strides.

    Each level is a 1x1 and a 3x3 convolution with LayerNorm on the map at its stride: two transposed convolutions with
    LayerNorm and GELU between (stride 4), one (8), none (16), a maximum of pairs (32).

    Args:
        width: D.
        out_width: E.
    """

    def __init__(self, width: int, out_width: int = 256) -> None:
        super().__init__()
        up = nn.ConvTranspose2d
        ways: list[list[nn.Module]] = [
            [up(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU(), up(width // 2, width // 4, 2, 2)],
            [up(width, width // 2, 2, 2)],
            [],
            [nn.MaxPool2d(2, 2)],
        ]
        widths = (width // 4, width // 2, width, width)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *way,
                nn.Conv2d(each, out_width, 1, bias=False),
                LayerNorm2d(out_width),
                nn.Conv2d(out_width, out_width, 3, padding=1, bias=False),
                LayerNorm2d(out_width),
            )
            for way, each in zip(ways, widths, strict=True)
        )

    def forward(self, x_BDhw: Tensor) -> list[Tensor]:
        """Map (B, D, H/16, W/16), even height and width -> levels (B, E, H/s, W/s), s = 4, 8, 16, 32."""
        return [level(x_BDhw) for level in self.levels]


class DetectorBackbone(nn.Module):
    """A backbone and its pyramid in the form that torchvision's detectors call.

    Args:
        backbone: Plain (:class:`SimplePyramid` on its last block's map) or hierarchical (a feature pyramid network on
            its four stages, arXiv 1612.03144).
        out_width: Width of the levels.
        autocast: Type of autocast in this part; the rest of the detector computes in float32. None: no autocast.
    """

    def __init__(self, backbone: Any, out_width: int = 256, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone, self.out_channels, self.autocast = backbone, out_width, autocast
        widths = [stage.width for stage in backbone.stage_info]
        self.plain = len(widths) == 1
        self.pyramid: nn.Module
        if self.plain:
            self.pyramid = SimplePyramid(widths[0], out_width)
        else:
            self.pyramid = FeaturePyramidNetwork(widths, out_width)
        for part in backbone.parts_after(backbone.stage_info[-1].taps.stop - 1):
            part.requires_grad_(False)
        for part in backbone.fixed_parts() if self.plain and hasattr(backbone, "conv1x1") else ():
            part.requires_grad_(part is backbone.pos_embed)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W), normalised, H and W multiples of 32 -> level -> map, float32, with one at stride 64."""
        device = images.device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast):
            taps = self.backbone.forward_intermediates(
                images, indices=1 if self.plain else None, intermediates_only=True
            )
            if self.plain:
                levels = self.pyramid(taps[0])
            else:
                levels = list(self.pyramid(OrderedDict(zip(LEVELS, taps, strict=True))).values())
        found = {name: level.float() for name, level in zip(LEVELS, levels, strict=True)}
        return found | {COARSEST: F.max_pool2d(found[LEVELS[-1]], 1, 2)}
