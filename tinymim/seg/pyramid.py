"""Taps at one stride -> four levels at strides 4, 8, 16 and 32, as in the published TinyMIM models.

Legend: B = batch, D = width, H, W = image height and width in pixels.
"""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """``fpn1`` .. ``fpn4``: four taps (B, D, ceil(H/16), ceil(W/16)) -> levels at :data:`STRIDES`.

    Args:
        width: Width D of the taps.
        last_width: Width of the last tap, which feeds the coarsest level.
        norm_cfg: MMSegmentation's normalisation.
        dim: Width of all levels (TinyMIM*-T: 768); None keeps D, and the two coarse levels have no parameters.
    """

    def __init__(self, width: int, last_width: int, norm_cfg: dict[str, Any], dim: int | None = None) -> None:
        super().__init__()
        wide, between = (width, width) if dim is None else (dim, dim // 2)
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(width, between, kernel_size=2, stride=2),
            build_norm_layer(norm_cfg, between)[1],
            nn.GELU(),
            nn.ConvTranspose2d(between, wide, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, wide, kernel_size=2, stride=2))
        self.fpn3: nn.Module
        self.fpn4: nn.Module
        if dim is None:
            self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        else:
            self.fpn3 = nn.Conv2d(width, wide, kernel_size=1)
            self.fpn4 = nn.Sequential(nn.Conv2d(last_width, wide, kernel_size=3, stride=2, padding=1))
        self.width = wide

    def forward(self, taps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """Taps, and the image's height and width in pixels -> levels (B, ``width``, ceil(H/s), ceil(W/s))."""
        levels = [level(tap) for level, tap in zip(self.children(), taps, strict=True)]
        for i, stride in enumerate(STRIDES[:2]):  # cut off a ragged image's padding; 16 and 32 have the right size
            # not -(-side // stride): ONNX rounds negative quotients towards zero
            levels[i] = levels[i][..., : (size[0] + stride - 1) // stride, : (size[1] + stride - 1) // stride]
        return tuple(levels)
