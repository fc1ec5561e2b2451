"""A small labelled folder and a small segmentation config for every test of this room."""

import pytest

from tinymim.demo.scenes import write_scenes

WIDTH = 24
CROPS = {  # --cfg-options of two crops of 64 pixels a step, read in the main process
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
    "model.data_preprocessor.size": (64, 64),
    "model.backbone.img_size": (64, 64),
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """12 training and 5 validation pairs of drawn scenes, 96 x 80 pixels, 12 classes, with dataset.json."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=12, val=5, size=(96, 80), seed=3)


@pytest.fixture(scope="session")
def small():
    """--cfg-options of a model 24 wide and of 6 steps, for upernet_tinymim_demo; ``small(**more)`` adds options."""

    def options(**more):
        return {
            "train_cfg.max_iters": 6,
            "train_cfg.val_interval": 6,
            "default_hooks.checkpoint.interval": 2,
            **CROPS,
            "model.backbone.embed_dim": WIDTH,
            "model.backbone.num_heads": 2,
            "model.backbone.drop_path_rate": 0.2,
            "model.decode_head.in_channels": [WIDTH] * 4,
            "model.decode_head.channels": 16,
            "model.auxiliary_head.in_channels": WIDTH,
            "model.auxiliary_head.channels": 16,
            **more,
        }

    return options
