"""torchvision's Mask R-CNN (arXiv 1703.06870) on a backbone of ours, with the heads of ViTDet (arXiv 2203.16527).

Legend: B = batch, M = objects of a photo, K = classes, H, W = height and width in pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from tinymim.det.pyramid import LEVELS, DetectorBackbone
from tinymim.errors import ConfigError
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

RATIOS = (0.5, 1.0, 2.0)


class Detector(nn.Module):
    """A detector and the plain values that describe it.

    Args:
        backbone: A backbone of ours.
        classes: Names of the K classes.
        img_size: Photos are resized until their longer side has so many pixels.
        channels: Width of the levels and heads.
        anchor_sizes: Sides of the anchors in pixels, one for each of the strides 4, 8, 16, 32 and 64.
        masks: Predict instance masks, too.
        autocast: Type of autocast in backbone and pyramid.

    Raises:
        ConfigError: no classes, or other than five anchor sizes.
    """

    def __init__(
        self,
        backbone: Any,
        classes: Sequence[str],
        *,
        img_size: int = 640,
        channels: int = 256,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        masks: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not classes or len(anchor_sizes) != 5:
            raise ConfigError(
                f"{len(classes)} classes and {len(anchor_sizes)} anchor sizes",
                "a detector needs classes, and an anchor size for each of the strides 4, 8, 16, 32 and 64",
                "e.g. anchor_sizes=[32,64,128,256,512]",
            )
        self.classes = [*classes]
        self.config = {
            "img_size": img_size,
            "channels": channels,
            "anchor_sizes": [float(size) for size in anchor_sizes],
            "masks": masks,
        }
        body = DetectorBackbone(backbone, channels, autocast)
        options: dict[str, Any] = dict(
            num_classes=None,
            min_size=img_size,
            max_size=img_size,
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
            rpn_anchor_generator=AnchorGenerator(
                tuple((float(size),) for size in anchor_sizes), (RATIOS,) * len(anchor_sizes)
            ),
            rpn_head=RPNHead(channels, len(RATIOS), conv_depth=2),
            box_roi_pool=MultiScaleRoIAlign([*LEVELS], 7, 2),
            box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], LayerNorm2d),
            box_predictor=FastRCNNPredictor(4 * channels, len(classes) + 1),
        )
        if masks:
            options |= dict(
                mask_roi_pool=MultiScaleRoIAlign([*LEVELS], 14, 2),
                mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, LayerNorm2d),
                mask_predictor=MaskRCNNPredictor(channels, channels, len(classes) + 1),
            )
        self.network = (MaskRCNN if masks else FasterRCNN)(body, **options)

    @property
    def backbone(self) -> Any:
        """The backbone."""
        return self.network.backbone.backbone

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """As torchvision's detectors.

        Args:
            images: RGB, (3, H, W) each, values from 0 to 1.
            targets: In training: ``boxes`` (M, 4) left, top, right, bottom in pixels, ``labels`` (M,) from 1, and with
                masks ``masks`` (M, H, W).

        Returns:
            In training named losses; else for each photo ``boxes``, ``labels``, ``scores`` and ``masks`` (M, 1, H, W).
        """
        return self.network([*images], None if targets is None else [*targets])
