"""The config for MMDetection, as far as it can be built without mmcv's compiled operators."""

from pathlib import Path

import torch
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from mmengine.registry import MODELS

import tinymim.det.mmdet
import tinymim.seg  # noqa: F401

CONFIG = Path(__file__).parents[2] / "mmdet_configs" / "mask_rcnn_tinymim_t_coco.py"


def test_backbone_and_neck_of_the_config_fit():
    """The backbone's map feeds the neck, whose five levels have the strides and width that the heads ask for."""
    cfg = Config.fromfile(CONFIG).model
    backbone, neck = MODELS.build({**cfg.backbone, "img_size": 64}), MODELS.build(cfg.neck)
    assert isinstance(neck, tinymim.det.mmdet.SimplePyramidNeck)
    levels = neck(backbone(torch.randn(1, 3, 64, 96)))
    strides = cfg.rpn_head.anchor_generator.strides
    width = cfg.rpn_head.in_channels
    assert [tuple(level.shape) for level in levels] == [(1, width, -(-64 // s), -(-96 // s)) for s in strides]
    _, norm = build_norm_layer(dict(cfg.roi_head.bbox_head.norm_cfg), 8)
    assert norm(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    assert cfg.roi_head.bbox_roi_extractor.featmap_strides == strides[:4]
