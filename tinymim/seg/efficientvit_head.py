"""EfficientViT's segmentation head (Cai et al., arXiv 2205.14756, section 4.2), for comparisons with its backbone.

Legend: B = batch, C = channels of a level or classes, h, w = height and width at the head's stride.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from timm.models.efficientvit_mit import ConvNormAct, MBConv, ResidualBlock
from torch import Tensor, nn


@MODELS.register_module()
class EfficientViTHead(BaseDecodeHead):
    """Levels are mapped to one width, up-sampled to the finest and added; MBConvs refine the sum; then the classifier.

    Built of timm's EfficientViT blocks. The paper's head of B1: levels at strides 8, 16 and 32, width 64, three MBConvs
    of expansion 4.

    Args:
        in_channels: Width of every level.
        channels: Width of the head.
        num_blocks: MBConvs after the sum.
        expand_ratio: Expansion of an MBConv.
        options: Keywords of ``BaseDecodeHead``, e.g. ``in_index`` (finest level first), ``num_classes``.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, *, num_blocks: int = 3, expand_ratio: float = 4, **options: Any
    ) -> None:
        super().__init__(in_channels, channels, input_transform="multiple_select", **options)
        act: Any = nn.Hardswish
        self.maps = nn.ModuleList(ConvNormAct(width, channels, 1, act_layer=None) for width in in_channels)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(
                    MBConv(channels, channels, expand_ratio=expand_ratio, act_layer=(act, act, None)), nn.Identity()
                )
                for _ in range(num_blocks)
            )
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels, each (B, C, ...) -> logits (B, classes, h, w) at the stride of the first level of ``in_index``."""
        maps = [layer(level) for layer, level in zip(self.maps, self._transform_inputs(levels), strict=True)]
        size = maps[0].shape[-2:]
        up = [
            nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners) for x in maps[1:]
        ]
        return self.cls_seg(self.blocks(torch.stack([maps[0], *up]).sum(0)))
