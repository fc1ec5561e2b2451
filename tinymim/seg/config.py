"""From a config file and options to one complete MMEngine config."""

import copy
import itertools
import pprint
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from tinymim import compat
from tinymim.data.folders import Layout, read_layout
from tinymim.errors import ConfigError
from tinymim.files import config_file

_runs = itertools.count(1)


def find_config(config: str | Path | Config) -> Config:
    """Load a config: a path, or the name of one of mmseg_configs ("upernet_tinymim_b").

    Raises:
        ConfigError: no such file, or it does not load.
    """
    if isinstance(config, Config):
        return copy.deepcopy(config)
    found = config_file(config)
    try:
        return Config.fromfile(str(found))
    except (OSError, ImportError, SyntaxError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot load the config {found}", f"{type(error).__name__}: {error}", "correct the file"
        ) from error


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Apply ``--cfg-options``; a changed ``train_cfg.max_iters`` also changes the schedule, which is printed.

    Raises:
        ConfigError: an option that does not fit the config.
    """
    options = options or {}
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, AssertionError, IndexError) as error:
        raise ConfigError(
            f"--cfg-options {' '.join(options)} does not fit the config", str(error), "check the names, dot by dot"
        ) from error
    if "train_cfg.max_iters" in options and not any(key.startswith("param_scheduler") for key in options):
        fit_schedule(cfg)


def fit_schedule(cfg: Config) -> None:
    """End the polynomial schedule at ``max_iters`` and keep the warm-up to at most a tenth of the run."""
    steps = int(cfg.train_cfg.max_iters)
    for scheduler in cfg.param_scheduler:
        if scheduler.type == "PolyLR":
            scheduler.end = steps + 1
        elif scheduler.type == "LinearLR":
            scheduler.end = min(int(scheduler.end) - 1, max(steps // 10, 1)) + 1
    ends = ", ".join(f"{s.type} ends after {s.end - 1} steps" for s in cfg.param_scheduler)
    say(f"schedule: {steps} steps, {ends}")


def set_data(
    cfg: Config,
    data_root: str | Path | None,
    ignore_label: int | Sequence[int] | None,
    reduce_zero_label: bool | None,
    *,
    splits: Sequence[str] = ("train", "val"),
) -> Layout:
    """Point the data loaders at a folder and give the heads its number of classes; return the layout.

    Raises:
        ConfigError: the config does not use ``TinyMIMSegDataset``.
        DataError: the folder is wrong.
    """
    loaders = {name: cfg[name] for name in ("train_dataloader", "val_dataloader", "test_dataloader")}
    for name, loader in loaders.items():
        if loader.dataset.type != "TinyMIMSegDataset":
            raise ConfigError(
                f"{name} uses {loader.dataset.type}",
                "tinymim segment reads folders in ADE20K layout through TinyMIMSegDataset",
                "use TinyMIMSegDataset, or MMSegmentation's own tools",
            )
        if loader.num_workers == 0:
            loader.persistent_workers = False
        for key, value in dict(
            data_root=None if data_root is None else str(data_root),
            ignore_label=ignore_label,
            reduce_zero_label=reduce_zero_label,
        ).items():
            if value is not None:
                loader.dataset[key] = value
    dataset = cfg.val_dataloader.dataset
    layout = read_layout(
        dataset.data_root,
        ignore_label=dataset.get("ignore_label"),
        reduce_zero_label=dataset.get("reduce_zero_label"),
    )
    for split in splits:
        layout.need(split)
    for head in heads(cfg):
        head.num_classes = len(layout.classes)
    return layout


def heads(cfg: Config) -> list[Any]:
    """The nodes of all heads of a config; MMSegmentation accepts one head or a list under each name."""
    found = [cfg.model.get(name) for name in ("decode_head", "auxiliary_head")]
    return [head for part in found if part for head in (part if isinstance(part, list) else [part])]


def set_device(cfg: Config, device: str | None, amp: bool) -> str:
    """Choose the device, the precision and the processes; SyncBN only on several GPUs. Return "cpu" or "cuda".

    Raises:
        ConfigError: no such device.
    """
    kind = compat.use_device(device)
    distributed = compat.launched_processes() > 1
    if amp and kind == "cpu":
        cfg.optim_wrapper.type = "CpuAmpOptimWrapper"
        if not torch.cpu._is_avx512_bf16_supported():
            say("note: this CPU has no bfloat16 instructions; --amp will be slower than without")
    elif amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        bf16 = torch.cuda.is_bf16_supported()
        cfg.optim_wrapper.dtype = "bfloat16" if bf16 else "float16"
        cfg.optim_wrapper.loss_scale = dict(enabled=False) if bf16 else "dynamic"
    if distributed and kind == "cuda":
        cfg.launcher = "pytorch"
    elif distributed:
        compat.start_cpu_processes(cfg)
    if not (distributed and kind == "cuda"):
        plain_batch_norm(cfg)
    return kind


def plain_batch_norm(node: Any) -> None:
    """Turn every SyncBN of a config into BN, in place."""
    for child in node.values() if isinstance(node, dict | Config) else node:
        if isinstance(child, dict):
            if child.get("type") == "SyncBN":
                child["type"] = "BN"
            plain_batch_norm(child)
        elif isinstance(child, list | tuple):
            plain_batch_norm(child)


class RunConfig(Config):
    """A config that is formatted in milliseconds: MMEngine's formatter takes a second, several times per run."""

    @property
    def pretty_text(self) -> str:
        """Python text of the whole config."""
        return config_text(self)


def config_text(cfg: Config) -> str:
    """Python text of a config, which ``Config.fromstring`` reads back."""
    return "".join(
        f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}\n" for key, value in cfg.to_dict().items()
    )


def name_run(cfg: Config) -> Config:
    """The config as ``config.py``, with a unique experiment name (MMEngine shares state between equal names)."""
    named = RunConfig(cfg.to_dict(), cfg_text="# tinymim", filename="config.py")
    named.experiment_name = f"tinymim_seg_{next(_runs)}"
    return named


def say(text: str) -> None:
    """Print on the first process."""
    if compat.is_first_process():
        print(text, flush=True)
