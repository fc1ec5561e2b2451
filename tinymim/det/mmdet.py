"""Our simple pyramid, and LayerNorm over channels, for MMDetection's configs.

A config has ``custom_imports = dict(imports=["tinymim.seg", "tinymim.det.mmdet"])``. MMDetection is not imported here.
It needs mmcv's compiled operators: with mmcv-lite ``import mmdet.models`` ends with "No module named 'mmcv._ext'". See
``mmdet_configs/mask_rcnn_tinymim_t_coco.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor

from tinymim.det.pyramid import SimplePyramid

MODELS.register_module(name="TinyMIMLayerNorm2d", module=LayerNorm2d)


@MODELS.register_module(name="TinyMIMSimplePyramid")
class SimplePyramidNeck(SimplePyramid):
    """:class:`~tinymim.det.pyramid.SimplePyramid` as a neck.

    Args:
        in_channels: Width of the one map that the backbone gives (``out_indices=(11,)``).
        out_channels: Width of the levels.
        num_outs: 4 (strides 4 to 32), or 5 with one at stride 64.
        init_cfg: Not used.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5, init_cfg: Any = None) -> None:
        super().__init__(in_channels, out_channels)
        self.num_outs = num_outs

    def init_weights(self) -> None:
        """PyTorch's own start is kept."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The backbone's maps, of which there is one -> the levels, finest first."""
        levels = super().forward(inputs[-1])
        return tuple(levels if self.num_outs == 4 else [*levels, F.max_pool2d(levels[-1], 1, 2)])
