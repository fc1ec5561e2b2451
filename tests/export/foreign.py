"""Tiny segmentors of other families as plain MMSegmentation files: a config and an iter_N.pth."""

import torch

from tests.export.conftest import CLASSES

SIZE = (64, 96)
SMALL = {  # what makes the shipped configs tiny; their structure stays
    "segformer_b0_camvid": {
        "model.backbone.embed_dims": 8,
        "model.backbone.num_heads": [1, 2, 4, 8],
        "model.backbone.num_layers": [1] * 4,
        "model.decode_head.in_channels": [8, 16, 32, 64],
        "model.decode_head.channels": 16,
    },
    "pidnet_s_camvid": {
        "model.backbone.channels": 8,
        "model.backbone.ppm_channels": 8,
        "model.decode_head.in_channels": 32,
        "model.decode_head.channels": 16,
    },
    "deeplabv3plus_r18_camvid": {
        "model.backbone.stem_channels": 8,
        "model.backbone.base_channels": 8,
        "model.decode_head.in_channels": 64,
        "model.decode_head.c1_in_channels": 8,
        "model.decode_head.c1_channels": 4,
        "model.decode_head.channels": 16,
        "model.auxiliary_head.in_channels": 32,
        "model.auxiliary_head.channels": 8,
    },
    "efficientvit_b1_camvid": {
        "model.backbone.model_name": "efficientvit_b0",
        "model.decode_head.in_channels": [32, 64, 128],
        "model.decode_head.channels": 8,
    },
}


def tiny(name):
    """A shipped config, tiny, with 7 classes and BN."""
    from tinymim.seg.config import find_config, heads, merge_options, plain_batch_norm

    cfg = find_config(name)
    merge_options(cfg, SMALL.get(name, {}) | {"model.data_preprocessor.size": SIZE})
    for head in heads(cfg):
        head.num_classes = len(CLASSES)
    plain_batch_norm(cfg)
    return cfg


def plain_file(cfg, path):
    """Write ``path`` and ``path.py`` as MMSegmentation's own trainer leaves them; return both."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    from tinymim.seg.config import config_text

    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, value in model.state_dict().items():
        if name.endswith("running_mean") or "conv_seg" in name:
            value.normal_(0, 0.3)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    meta = {"dataset_meta": {"classes": tuple(CLASSES), "palette": [[i, 2, 3] for i in range(len(CLASSES))]}, "iter": 4}
    torch.save({"state_dict": model.state_dict(), "meta": meta, "message_hub": {}}, path)
    config = path.with_suffix(".py")
    config.write_text(config_text(cfg))
    return path, config
