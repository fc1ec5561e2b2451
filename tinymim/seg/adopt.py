"""A config that reads one of MMSegmentation's datasets, given a folder: loops, loaders and hooks become ours."""

import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config

from tinymim.cores import cores
from tinymim.errors import ConfigError
from tinymim.progress import say

LOADERS = {"train_dataloader": "train", "val_dataloader": "val", "test_dataloader": "val"}
READERS = {"LoadImageFromFile": "LoadPhoto", "LoadAnnotations": "LoadLabel"}
OURS = "TinyMIMSegDataset"


def adopt(cfg: Config, data_root: str | Path | None) -> None:
    """Where a folder is given, read it in place of MMSegmentation's dataset; model, augmentation and schedule stay.

    Nothing is done without a folder, or to a config whose loaders all read folders.

    Args:
        cfg: Changed in place.
        data_root: The folder, in ADE20K layout.

    Raises:
        ConfigError: a loader has no plain dataset with a pipeline (a wrapped or concatenated one).
    """
    kinds = {name: _dataset(cfg, name).get("type") for name in LOADERS}
    if data_root is None or set(kinds.values()) == {OURS}:
        return
    for name, split in LOADERS.items():
        if kinds[name] == OURS:
            continue
        pipeline = _dataset(cfg, name).get("pipeline")
        if not isinstance(pipeline, list | tuple):
            raise ConfigError(
                f"{name} uses {kinds[name] or 'no dataset'} without a pipeline of its own",
                "tinymim segment reads --data-root through the transforms of the config's dataset",
                f"give the config a plain dataset with a pipeline, or use {OURS}",
            )
        loader = cfg[name]
        loader.dataset = dict(
            type=OURS, data_root=str(data_root), split=split, test_mode=split == "val", pipeline=_readers(pipeline)
        )
        loader.sampler = (
            dict(type="ResumableSampler", shuffle=True)
            if split == "train"
            else dict(type="DefaultSampler", shuffle=False, round_up=False)
        )
        loader.num_workers = min(loader.get("num_workers", 0), cores())
        loader.persistent_workers = loader.num_workers > 0
    if "tta_pipeline" in cfg:
        cfg.tta_pipeline = _readers(cfg.tta_pipeline)
    cfg.val_evaluator = cfg.test_evaluator = dict(type="SegMetric")
    if kinds["train_dataloader"] != OURS:
        _train_as_ours(cfg)
    foreign = dict.fromkeys(kind or "no named dataset" for kind in kinds.values() if kind != OURS)
    say(f"note: {data_root} is read in place of {', '.join(foreign)}; labels as dataset.json or the options say")


def _train_as_ours(cfg: Config) -> None:
    """Loop, checkpoints, log and seed of a training that resumes exactly."""
    steps = int((cfg.get("train_cfg") or {}).get("val_interval", 1000))
    cfg.merge_from_dict({"train_cfg.type": "ResumableTrainLoop"})
    checkpoint = dict(type="RunFolderHook", interval=steps, keep=2, log_interval=10)
    cfg.default_hooks = dict(logger=None, checkpoint=checkpoint)
    cfg.log_level = "ERROR"
    cfg.setdefault("randomness", dict(seed=0))
    for key in ("visualizer", "vis_backends", "log_processor"):
        cfg.pop(key, None)


def _dataset(cfg: Config, name: str) -> Any:
    loader = cfg.get(name)
    found = loader.get("dataset") if isinstance(loader, dict) else None
    return found if isinstance(found, dict) else {}


def _readers(pipeline: Any) -> Any:
    """A pipeline, with nested ones, whose photos and labels are read by ours."""
    if isinstance(pipeline, list | tuple):
        return type(pipeline)(_readers(each) for each in pipeline)
    if isinstance(pipeline, dict):
        if pipeline.get("type") in READERS:
            return dict(type=READERS[pipeline["type"]])
        return {
            key: _readers(value) if isinstance(value, list | tuple) else copy.deepcopy(value)
            for key, value in pipeline.items()
        }
    return pipeline
