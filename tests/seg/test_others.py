"""MMSegmentation's own models through our tools: trained, stored, scored, from segmentor.pth and from iter_N.pth."""

import json

import numpy as np
import pytest
import torch

from tests.export.foreign import SMALL
from tinymim.errors import ConfigError
from tinymim.seg import load_segmentor, test_segmentor, train_segmentor
from tinymim.seg.config import find_config, heads, merge_options, set_data

STEPS = {
    "train_cfg.max_iters": 3,
    "train_cfg.val_interval": 3,
    "default_hooks.checkpoint.interval": 3,
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
    "model.data_preprocessor.size": (64, 64),
}


@pytest.mark.parametrize(
    "name", [name if "segformer" in name else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_trained_stored_and_scored(name, scenes, tmp_path):
    folder = tmp_path / "run"
    result = train_segmentor(name, work_dir=folder, data_root=scenes, cfg_options=STEPS | SMALL[name])
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses[:-1])
    if name == "pidnet_s_camvid":
        assert {"decode.loss_sem_p", "decode.loss_sem_i", "decode.loss_bd", "decode.loss_sem_bd"} <= set(losses[0])
    meta = torch.load(result.segmentor, weights_only=True)["meta"]
    assert (meta["backbone"], len(meta["classes"])) == (None, 12)
    assert np.array_equal(test_segmentor(None, result.segmentor).confusion, result.confusion)
    plain = test_segmentor(folder / "config.py", folder / "checkpoints" / "iter_3.pth")
    assert np.array_equal(plain.confusion, result.confusion)


@pytest.mark.slow
def test_resumed_pidnet_is_bit_identical(scenes, tmp_path):
    """Batch statistics, boundary maps and SGD's momentum survive a resume."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = STEPS | SMALL["pidnet_s_camvid"] | {"param_scheduler": []}
    schedule = {"param_scheduler": [dict(type="PolyLR", power=0.9, begin=0, end=9, by_epoch=False)]}
    train_segmentor("pidnet_s_camvid", work_dir=whole, data_root=scenes, cfg_options=options | schedule)
    for steps in (1, 3):
        train_segmentor(
            "pidnet_s_camvid",
            work_dir=halves,
            data_root=scenes,
            resume=steps == 3,
            cfg_options=options | schedule | {"train_cfg.max_iters": steps},
        )
    a, b = (torch.load(folder / "segmentor.pth", weights_only=True)["state_dict"] for folder in (whole, halves))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_lists_of_heads_get_the_classes_of_the_data(scenes):
    cfg = find_config("deeplabv3plus_r18_camvid")
    aux = cfg.model.auxiliary_head
    cfg.model.auxiliary_head = [aux, aux.copy()]
    set_data(cfg, scenes, None, None)
    assert [head.num_classes for head in heads(cfg)] == [12, 12, 12]


def test_one_channel_and_two_classes(tmp_path):
    """A head that decides by threshold keeps the number of classes its config gives."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    cfg = find_config("deeplabv3plus_r18_camvid")
    sigmoid = {"num_classes": 2, "out_channels": 1, "threshold": 0.4}
    merge_options(cfg, {f"model.decode_head.{key}": value for key, value in sigmoid.items()})
    merge_options(cfg, SMALL["deeplabv3plus_r18_camvid"] | {"model.decode_head.loss_decode.use_sigmoid": True})
    cfg.model.auxiliary_head = None
    init_default_scope("mmseg")
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, tmp_path / "iter_1.pth")
    model, _ = load_segmentor(tmp_path / "iter_1.pth", cfg)
    assert (model.num_classes, model.out_channels) == (2, 1)


def test_layer_decay_asks_for_our_backbone(scenes, tmp_path):
    wrapper = find_config("upernet_tinymim_t").optim_wrapper.to_dict() | {"_delete_": True}
    with pytest.raises(ConfigError, match="ResNetV1c has no get_layer_id"):
        train_segmentor(
            "deeplabv3plus_r18_camvid",
            work_dir=tmp_path / "run",
            data_root=scenes,
            cfg_options=STEPS | SMALL["deeplabv3plus_r18_camvid"] | {"optim_wrapper": wrapper},
        )
