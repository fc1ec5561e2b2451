"""Keys and values of MMSegmentation configs: what constructors take is known, everything else has to be asked for."""

import random
from pathlib import Path

import mmseg
import pytest
from mmengine.config import Config

from tinymim.cli._cfg_options import parse_value
from tinymim.errors import ConfigError
from tinymim.files import config_file
from tinymim.seg import train_segmentor
from tinymim.seg.config import find_config, merge_options
from tinymim.seg.known import check_config

PUBLIC = sorted(Path(mmseg.__file__).parent.glob(".mim/configs/*/*.py"))


@pytest.fixture(scope="module")
def demo():
    return find_config("upernet_tinymim_demo")


def merged(demo, *words):
    cfg = find_config(demo)  # a copy
    pairs = (word.partition("=") for word in words)
    merge_options(cfg, {key: parse_value(key, text) for key, _, text in pairs})
    return cfg


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("train_cfg.max_itres=9", "train_cfg.max_iters"),
        ("train_cfg.max_iter=3", "train_cfg.max_iters"),
        ("tran_cfg.max_iters=3", "train_cfg"),
        ("train_dataloader.batchsize=3", "train_dataloader.batch_size"),
        ("model.decode_head.num_class=3", "model.decode_head.num_classes"),
        ("model.backbone.embed_dmi=3", "model.backbone.embed_dim"),
        ("model.decode_head.loss_decode.loss_wieght=2", "model.decode_head.loss_decode.loss_weight"),
        ("model.data_preprocessor.sizee=(64,64)", "model.data_preprocessor.size"),
        ("model.test_cfg.crp_size=3", "model.test_cfg.crop_size"),
        ("optim_wrapper.optimizer.weigth_decay=1", "optim_wrapper.optimizer.weight_decay"),
        ("optim_wrapper.clip_grad.max_nrom=1", "optim_wrapper.clip_grad.max_norm"),
        ("optim_wrapper.paramwise_cfg.layer_deacy=.5", "optim_wrapper.paramwise_cfg.layer_decay"),
        ("param_scheduler.0.ned=3", "param_scheduler.0.end"),
        ("default_hooks.chekpoint.interval=1", "default_hooks.checkpoint"),
        ("default_hooks.checkpoint.intervall=1", "default_hooks.checkpoint.interval"),
        ("randomness.sed=1", "randomness.seed"),
        ("env_cfg.cudnn_benchmrk=True", "env_cfg.cudnn_benchmark"),
        ("val_dataloader.dataset.ignore_lable=0", "val_dataloader.dataset.ignore_label"),
        ("model.decode_head.type=UPerHaed", "UPerHead"),
        ("optim_wrapper.constructor=TinyMIMLayerDecayOptimizerConstruktor", "TinyMIMLayerDecayOptimizerConstructor"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(demo, option, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        merged(demo, option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train_dataloader.batch_size=two", "it must be a number, as 16 is"),
        ("train_dataloader.batch_size=1000000000000", "whole number from 1 to"),
        ("train_dataloader.num_workers=-3", "whole number from 0 to 1024"),
        ("train_cfg.max_iters=0", "whole number of at least 1"),
        ("train_cfg.max_iters=1.5", "whole number"),
        ("optim_wrapper.optimizer.lr=abc", "it must be a number, as 0.001 is"),
        ("optim_wrapper.optimizer.lr=nan", "it must be a number of at least 0"),
        ("train_dataloader.dataset.pipeline.3.crop_size=(64,64,64)", "or two"),
        ("train_dataloader.dataset.pipeline.9.crop_size=(64,64)", "is a list of 6"),
        ("train_dataloader.sampler.shuffle=maybe", "True or False"),
        ("model.backbone=5", "it must be a dict"),
        ("model.backbone.depth=1000000000", "no model has more than 1024"),
        ("model.backbone.img_size=1000000000", "number of pixels"),
        ("model.decode_head.channels.x=1", "is 64, no dict"),
        ("param_scheduler=abc", "it must be a list"),
        ("default_hooks.checkpoint.interval=0", "whole number of at least 1"),
        ("model.decode_head.dropout_ratio=7", "from -1 to 1"),
        ("randomness.seed=-1", "whole number from 0"),
        ("model.decode_head.type=FCNHead", "unknown key 'model.decode_head.pool_scales' in a FCNHead"),
        ("+train_cfg.max_itres=9", "unknown key 'train_cfg.max_itres' in a ResumableTrainLoop"),
    ],
)
def test_a_wrong_value_names_key_value_and_type(demo, option, words):
    with pytest.raises(ConfigError, match=words):
        merged(demo, option)


def test_legal_additions_need_no_asking(demo):
    cfg = merged(
        demo,
        "optim_wrapper.type=AmpOptimWrapper",
        "optim_wrapper.loss_scale=dynamic",
        "optim_wrapper.clip_grad.max_norm=1",
        "optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult=10",
        "optim_wrapper.optimizer.amsgrad=True",
        "model.decode_head.loss_decode.avg_non_ignore=True",
        "model.decode_head.sampler.type=OHEMPixelSampler",
        "model.test_cfg.crop_size=(64,64)",
        "model.auxiliary_head=None",
        "randomness.deterministic=True",
        "train_dataloader.pin_memory=True",
        "val_dataloader.dataset.ignore_label=0",
        "custom_hooks=[]",
        "+mine.x=3",
    )
    assert (cfg.optim_wrapper.clip_grad.max_norm, cfg.mine.x, cfg.model.auxiliary_head) == (1, 3, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_cfg = dict(max_itres=9)", "did you mean 'train_cfg.max_iters'"),
        ("train_cgf = dict(max_iters=9)", "did you mean 'train_cfg'"),
        ("model = dict(decode_head=dict(num_class=3))", "did you mean 'model.decode_head.num_classes'"),
        ("train_dataloader = dict(batch_size='two')", "it must be a whole number"),
        ("custom_hooks = [3]", "cannot build the run"),
        ("optim_wrapper = None", "the config has no optim_wrapper"),
        ("val_evaluator = dict(_delete_=True, type='IoUMetric')", "scores with SegMetric"),
        ("train_dataloader = dict(dataset=dict(pipeline=[]))", "it must be a list of transforms"),
        ("val_dataloader = dict(dataset=dict(split='vall'))", "it must be 'train' or 'val'"),
        ("model = dict(decode_head=dict(in_index=9))", "cannot build the model"),
        ("optim_wrapper = dict(optimizer=dict(betas=5))", "cannot build the run"),
    ],
)
def test_mistakes_of_a_file_leave_nothing_behind(scenes, small, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(f"_base_ = {str(config_file('upernet_tinymim_demo'))!r}\n{text}\n")
    options = {key: value for key, value in small().items() if "pipeline" not in key}
    options.pop("train_dataloader.batch_size")
    with pytest.raises(ConfigError, match=words):
        train_segmentor(tmp_path / "mine.py", work_dir=tmp_path / "run", data_root=scenes, cfg_options=options)
    assert not (tmp_path / "run").exists()


def test_public_configs_pass():
    """Of MMSegmentation's own configs, those pass that it can build here (its mask heads need mmdet)."""
    for path in random.Random(0).sample([p for p in PUBLIC if not p.parent.name.startswith("mask")], 4):
        check_config(Config.fromfile(path, import_custom_modules=False))


@pytest.mark.slow
def test_all_public_configs_pass():
    refused = {}
    for path in PUBLIC:
        try:
            check_config(Config.fromfile(path, import_custom_modules=False))
        except ConfigError as error:
            refused[path.name] = error.what
    real = {name: what for name, what in refused.items() if "mask" not in name and not name.startswith("vpd")}
    misprint = "bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py"  # theirs
    assert real == {misprint: "unknown key 'models' in the config"}
    assert len(PUBLIC) > 500
