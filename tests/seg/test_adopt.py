"""A config of MMSegmentation that names one of its datasets reads the folder of --data-root."""

import copy
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from tinymim.errors import ConfigError
from tinymim.seg import train_segmentor
from tinymim.seg.adopt import adopt
from tinymim.seg.config import find_config, set_data

PAGE = Path(__file__).resolve().parents[2] / "docs/start/mmsegmentation.md"
SMALL = {
    "model.backbone.init_cfg": None,
    "model.backbone.depth": 4,
    "model.backbone.embed_dim": 24,
    "model.backbone.num_heads": 2,
    "model.backbone.out_indices": [0, 1, 2, 3],
    "model.decode_head.in_channels": [24, 24, 24, 24],
    "model.decode_head.channels": 16,
    "model.auxiliary_head.in_channels": 24,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
}


@pytest.fixture
def own(tmp_path) -> Path:
    """The config of the page."""
    path = tmp_path / "own.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1], "utf-8")
    return path


def test_loaders_loops_and_scores_become_ours(own, scenes):
    cfg = find_config(own)
    with pytest.raises(ConfigError, match=r"ADE20KDataset|IoUMetric"):
        set_data(cfg, None, None, None)
    before = cfg.train_dataloader.dataset.pipeline
    layout = set_data(cfg, scenes, None, None)
    assert cfg.model.decode_head.num_classes == len(layout.classes)
    assert [cfg[f"{name}_dataloader"].dataset.type for name in ("train", "val", "test")] == ["TinyMIMSegDataset"] * 3
    after = cfg.train_dataloader.dataset.pipeline
    assert [step["type"] for step in after[:2]] == ["LoadPhoto", "LoadLabel"]
    assert after[2:] == before[2:]
    assert "LoadAnnotations" not in str(cfg.tta_pipeline)
    assert cfg.train_cfg.type == "ResumableTrainLoop"
    text = cfg.pretty_text
    adopt(cfg, scenes)  # a config of ours stays
    assert cfg.pretty_text == text


def test_another_number_of_classes_is_said(own, scenes, capsys):
    cfg = find_config(own)
    cfg.model.decode_head.num_classes, cfg.model.auxiliary_head.num_classes = 21, 150
    set_data(cfg, scenes, None, None)
    count = cfg.model.decode_head.num_classes
    assert f"heads get the {count} classes of {scenes}, in place of num_classes=150 and 21" in capsys.readouterr().out
    set_data(cfg, scenes, None, None)
    set_data(find_config("upernet_tinymim_b"), scenes, None, None)  # 150: ours, of any folder
    assert "num_classes" not in capsys.readouterr().out


def test_only_a_test_set_of_mmsegmentation(own, scenes, capsys):
    cfg, foreign = find_config("upernet_tinymim_t_light"), find_config(own)
    cfg.test_dataloader, cfg.test_evaluator = foreign.test_dataloader, foreign.test_evaluator
    kept = {key: copy.deepcopy(cfg[key]) for key in ("train_cfg", "default_hooks", "val_evaluator", "train_dataloader")}
    adopt(cfg, scenes)
    assert cfg.test_dataloader.dataset.type == "TinyMIMSegDataset"
    assert cfg.test_evaluator.type == "SegMetric"
    assert {key: cfg[key] for key in kept} == kept
    assert "in place of ADE20KDataset;" in capsys.readouterr().out


def test_a_dataset_without_pipeline_is_refused(own, scenes):
    cfg = find_config(own)
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[])
    with pytest.raises(ConfigError, match="without a pipeline"):
        adopt(cfg, scenes)


@pytest.mark.slow
def test_it_trains(own, scenes, tmp_path):
    options = SMALL | {"val_dataloader.persistent_workers": False}
    made = train_segmentor(
        own, data_root=scenes, work_dir=tmp_path / "run", max_steps=1, batch_size=2, img_size=64, cfg_options=options
    )
    assert (tmp_path / "run" / "segmentor.pth").is_file()
    assert made is not None
    assert isinstance(Config.fromfile(tmp_path / "run" / "config.py").model.backbone.depth, int)
