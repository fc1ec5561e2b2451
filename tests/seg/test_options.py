"""Options that stand for keys of a config, the best validation, early stops, and pictures at every validation."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.test_health import scalars
from tinymim.data.folders import read_layout
from tinymim.data.label_files import read_ids
from tinymim.errors import ConfigError
from tinymim.seg import train_segmentor
from tinymim.seg.config import find_config, set_data
from tinymim.seg.metric import SegMetric
from tinymim.seg.options import class_weights, length_options, set_balance, set_size

DEMO = "upernet_tinymim_demo"
CONFIGS = [
    "upernet_tinymim_t_light",
    "linear_tinymim_t_small_data",
    "pidnet_s_camvid",
    "upernet_hiera_tiny",
    "segformer_b0_camvid",
]


def sizes(node):
    """Every size in the pipelines of a config."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("scale", "crop_size") and isinstance(value, list | tuple):
                yield tuple(value)
            else:
                yield from sizes(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from sizes(value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_follows_the_crop(name):
    before, cfg = find_config(name), find_config(name)
    height, width = before.model.data_preprocessor.size
    set_size(cfg, (2 * height, 2 * width))
    assert tuple(cfg.model.data_preprocessor.size) == (2 * height, 2 * width)
    for loader in ("train_dataloader", "val_dataloader"):
        was, now = (list(sizes(each[loader].dataset.pipeline)) for each in (before, cfg))
        assert now == [tuple(2 * side for side in size) for size in was]
    assert list(sizes(cfg.tta_pipeline)) == [tuple(2 * side for side in size) for size in sizes(before.tta_pipeline)]
    if name.startswith("upernet_tinymim"):
        assert cfg.model.backbone.img_size == (2 * height, 2 * width)
    test = before.model.test_cfg
    if test.mode == "slide":
        assert tuple(cfg.model.test_cfg.crop_size) == tuple(2 * side for side in test.crop_size)
    set_size(before, None)
    assert tuple(before.model.data_preprocessor.size) == (height, width)


def test_a_side_is_a_square_and_others_are_refused():
    cfg = find_config(DEMO)
    set_size(cfg, 96)
    assert tuple(cfg.model.data_preprocessor.size) == (96, 96)
    for size in ([1, 2, 3], 8, [64, 0], []):
        with pytest.raises(ConfigError, match="--img-size"):
            set_size(find_config(DEMO), size)


def test_lengths():
    cfg = find_config("upernet_tinymim_t_light")
    batch = cfg.train_dataloader.batch_size
    assert length_options(cfg, 100) == {}
    made = length_options(cfg, 100, epochs=3, batch_size=8, lr=1e-3)
    assert made["train_cfg.max_iters"] == math.ceil(3 * 100 / 8)
    assert made["train_cfg.val_interval"] == made["default_hooks.checkpoint.interval"] == 8
    assert made["train_dataloader.batch_size"] == 8
    assert made["optim_wrapper.optimizer.lr"] == 1e-3
    assert length_options(cfg, 100, epochs=0.5)["train_cfg.max_iters"] == math.ceil(50 / batch)
    assert length_options(cfg, 100, max_steps=10**6)["train_cfg.val_interval"] == cfg.train_cfg.val_interval
    for wrong in (
        dict(epochs=1, max_steps=1),
        dict(epochs=0),
        dict(epochs=math.nan),
        dict(max_steps=0),
        dict(batch_size=0),
        dict(lr=0),
        dict(lr=math.inf),
    ):
        with pytest.raises(ConfigError, match="--"):
            length_options(cfg, 100, **wrong)


def test_a_batch_is_split_over_processes(monkeypatch):
    monkeypatch.setattr("tinymim.compat.launched_processes", lambda: 4)
    cfg = find_config(DEMO)
    assert length_options(cfg, 64, epochs=1, batch_size=16) | {} == {
        "train_dataloader.batch_size": 4,
        "train_cfg.max_iters": 4,
        "train_cfg.val_interval": 1,
        "default_hooks.checkpoint.interval": 1,
    }
    with pytest.raises(ConfigError, match="multiple of 4"):
        length_options(cfg, 64, batch_size=6)


def test_class_weights(scenes):
    layout = read_layout(scenes)
    pixels = np.bincount(np.concatenate([read_ids(label).ravel() for _, label in layout.train]), minlength=12)[:12]
    share, found = pixels / pixels.sum(), np.array(class_weights(layout))
    assert (share * found).sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found * np.log(1.02 + share), found[0] * np.log(1.02 + share[0]), rtol=1e-3)


@pytest.mark.parametrize(("name", "words"), [("pidnet_s_camvid", "weights"), ("upernet_tinymim_t_light", "ohem")])
def test_balance_reaches_the_losses(name, words, scenes):
    cfg = find_config(name)
    layout = set_data(cfg, scenes, None, None)
    set_balance(cfg, words, layout)
    if words == "ohem":
        assert {cfg.model[head].sampler.type for head in ("decode_head", "auxiliary_head")} == {"OHEMPixelSampler"}
    else:
        weighted = [loss.type for loss in cfg.model.decode_head.loss_decode if "class_weight" in loss]
        assert {*weighted} == {"OhemCrossEntropy"}


def test_balance_that_cannot_be(scenes):
    cfg = find_config("pidnet_s_camvid")
    layout = set_data(cfg, scenes, None, None)
    with pytest.raises(ConfigError, match="ohem and PIDHead"):
        set_balance(cfg, "ohem", layout)
    with pytest.raises(ConfigError, match="--balance rare"):
        set_balance(cfg, "rare", layout)
    cfg = find_config(DEMO)
    layout = set_data(cfg, scenes, None, None)
    cfg.model.decode_head.loss_decode = dict(type="DiceLoss")
    with pytest.raises(ConfigError, match="no cross-entropy"):
        set_balance(cfg, "weights", layout)


def scripted(monkeypatch, scores):
    """Let validations give these scores; later ones the last."""
    rest, measure = list(scores), SegMetric.evaluate

    def evaluate(self, size):
        found = measure(self, size)
        return {**found, "mIoU": rest.pop(0) if len(rest) > 1 else rest[0]}

    monkeypatch.setattr(SegMetric, "evaluate", evaluate)


def test_the_best_validation_is_kept_and_the_run_stops(scenes, small, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.2, 0.5, 0.4, 0.3, 0.1])
    options = dict(data_root=scenes, cfg_options=small(**{"train_cfg.val_interval": 1}), patience=2)
    result = train_segmentor(DEMO, work_dir=tmp_path / "run", **options)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "mIoU" in line] == [1, 2, 3, 4]
    assert "no better mIoU than 50.00 % of step 2" in capsys.readouterr().out
    assert result.best.name == "best_segmentor.pth"
    meta = torch.load(result.best, weights_only=True)["meta"]
    assert (meta["step"], meta["metrics"]["mIoU"]) == (2, 0.5)
    noted = json.loads((tmp_path / "run/env.json").read_text())["outputs"]
    assert set(noted) == {"segmentor.pth", "best_segmentor.pth"}
    assert torch.load(result.segmentor, weights_only=True)["meta"]["step"] == 4
    again = train_segmentor(DEMO, work_dir=tmp_path / "run", resume=True, **options)  # nothing is left to do
    assert torch.load(again.segmentor, weights_only=True)["meta"]["step"] == 4


def test_a_last_validation_that_is_the_best_leaves_one_file(scenes, small, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.1, 0.5])
    options = small(**{"train_cfg.val_interval": 2})
    result = train_segmentor(DEMO, work_dir=tmp_path / "run", data_root=scenes, cfg_options=options)
    assert result.best == result.segmentor
    assert not (tmp_path / "run/best_segmentor.pth").exists()
    assert set(json.loads((tmp_path / "run/env.json").read_text())["outputs"]) == {"segmentor.pth"}


@pytest.mark.slow
def test_balanced_logged_and_pictured(scenes, small, tmp_path):
    """A short run by options alone, its TensorBoard and its page."""
    from tinymim_export.report.page import run_report

    result = train_segmentor(
        DEMO,
        work_dir=tmp_path / "run",
        data_root=scenes,
        cfg_options=small(),
        max_steps=4,
        batch_size=3,
        lr=2e-3,
        img_size=(48, 64),
        balance="weights",
        log=["tensorboard"],
    )
    run = result.work_dir
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found if "mIoU" in line] == [1, 2, 3, 4]
    shown = scalars(run / "tensorboard")
    assert [step for step, _ in shown["mIoU"]] == [1, 2, 3, 4]
    assert shown["loss"][-1][1] == pytest.approx(next(v["loss"] for v in found if v["step"] == 4 and "loss" in v))
    about = json.loads((run / "predictions/photos.json").read_text())
    assert len(about["photos"]) == 4
    for name in ("00_00000004.png", "00_labels.png"):
        with Image.open(run / "predictions" / name) as mask:
            assert (mask.size, mask.mode) == ((96, 80), "P")
    page = run_report(run).read_text("utf-8")
    assert "step 4: " in page
    assert "wrong: " in page
    assert 'alt="labels"' in page
    assert "<figcaption>constant_mIoU" not in page


def test_a_back_end_that_is_not_there(scenes, small, tmp_path):
    for name, words in (("tensorbord", "did you mean 'tensorboard'"), ("neptune", "pip install neptune")):
        with pytest.raises(ConfigError, match="--log") as caught:
            train_segmentor(DEMO, work_dir=tmp_path / "run", data_root=scenes, cfg_options=small(), log=[name])
        assert words in caught.value.fix
    assert not (tmp_path / "run").exists()
