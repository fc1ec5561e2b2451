"""From a config file and options to one complete MMEngine config."""

import copy
import itertools
import pprint
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from tinymim import compat, progress
from tinymim.data.folders import Layout, Pair, read_layout
from tinymim.data.photo_files import tell
from tinymim.engine.cost import check_memory
from tinymim.engine.parallel import ShardedModel, check_strategy
from tinymim.engine.python_file import load_python
from tinymim.engine.recipe import split_added
from tinymim.errors import ConfigError
from tinymim.files import config_file, own_configs
from tinymim.literals import not_literal
from tinymim.seg.adopt import adopt
from tinymim.seg.dataset import pseudo_per_pass, read_pseudo

MOST_WEIGHT = 100  # of a pseudo-labelled photo
_runs = itertools.count(1)


def find_config(config: str | Path | Config) -> Config:
    """Load a config: a path, or the name of one of mmseg_configs ("upernet_tinymim_b").

    Raises:
        ConfigError: no such file, or it does not load.
    """
    if isinstance(config, Config):
        return copy.deepcopy(config)
    cfg = load_python(config_file(config))
    name_types(cfg)
    return cfg


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Apply ``--cfg-options`` and check the whole config; a changed ``train_cfg.max_iters`` also changes the schedule,
    which is printed.

    Args:
        cfg: The config, changed in place.
        options: Dotted key -> value; ``+key`` asks for a key that the config does not know.

    Raises:
        ConfigError: a key that is not known, or a value that cannot be.
    """
    from tinymim.seg.known import check_config, check_options

    options, added = split_added(options or {})
    check_options(cfg, options, added)
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"--cfg-options {' '.join(options)} does not fit the config", str(error), "check the names, dot by dot"
        ) from error
    check_config(cfg)
    scheduled = isinstance(cfg.get("train_cfg"), dict) and cfg.get("param_scheduler")
    if "train_cfg.max_iters" in options and scheduled and not any(key.startswith("param_scheduler") for key in options):
        fit_schedule(cfg)


def name_types(node: Any, place: str = "") -> None:
    """Write the registered name for every class that a config has as a ``type``, so that a run can keep it as data.

    Raises:
        ConfigError: a value that is no data: a function, a class that is not registered, an array.
    """
    from tinymim.seg.known import REGISTRIES

    for key, value in list(node.items() if isinstance(node, dict | Config) else enumerate(node)):
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, dict | list):
            name_types(value, name)
        elif wrong := next(not_literal(value, name), None):
            names = {known: each for registry in REGISTRIES for each, known in registry.module_dict.items()}
            if key != "type" or not isinstance(value, Hashable) or value not in names:
                raise ConfigError(
                    f"{wrong[0]} is a {type(wrong[1]).__name__}: {wrong[1]!r:.80}",
                    "a run keeps its config as data: numbers, texts, lists and dicts",
                    "write the value itself, or register the class and write its name",
                )
            node[key] = names[value]


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn what constructors of MMSegmentation and MMEngine raise into our error.

    Args:
        what: What is built, for the error.

    Raises:
        ConfigError: a constructor refused its arguments, or a type is not registered.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AssertionError, AttributeError, ImportError, ArithmeticError) as error:
        raise ConfigError(
            f"cannot build the {what} of the config",
            f"{type(error).__name__}: {str(error)[:400]}",
            "correct the config",
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(("Failed to get", "class `")):  # of MMEngine's registries
            raise
        raise ConfigError(f"cannot build the {what} of the config", str(error)[:400], "correct the config") from error


def build_model(cfg: Config) -> Any:
    """The segmentor of a config.

    Raises:
        ConfigError: it does not build.
    """
    init_default_scope("mmseg")
    with building("model"):
        return MODELS.build(cfg.model)


def model_outline(cfg: Config) -> nn.Module | None:
    """The model of a config without weights (on the meta device), in milliseconds and without memory.

    Returns:
        None if the model cannot be built that way.

    Raises:
        ConfigError: a constructor refuses its arguments, or this machine's memory cannot hold the weights.
    """
    init_default_scope("mmseg")
    with building("model"):
        try:
            with torch.device("meta"):
                model = MODELS.build(copy.deepcopy(cfg.model))
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            return None
    check_memory(model)
    return model


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


def steps_of(cfg: Config) -> int:
    """``train_cfg.max_iters``.

    Raises:
        ConfigError: there is none, or it is no whole number above 0.
    """
    steps = (cfg.get("train_cfg") or {}).get("max_iters")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"train_cfg.max_iters is {steps!r}", "a run takes at least one step", "give a whole number")
    return steps


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
        ConfigError: the config does not use ``TinyMIMSegDataset``, and no folder is given.
        DataError: the folder is wrong.
    """
    adopt(cfg, data_root)
    needed = ("model", "train_cfg", "optim_wrapper") if "train" in splits else ("model",)
    if wrong := [key for key in needed if not isinstance(cfg.get(key), dict)]:
        raise ConfigError(f"the config has no {wrong[0]}", "a run needs it", "start from a config of mmseg_configs")
    if "train" in splits:
        steps_of(cfg)
    scored = cfg.get("val_evaluator")
    kinds = [each.get("type") for each in (scored if isinstance(scored, list) else [scored]) if isinstance(each, dict)]
    if "train" in splits and "SegMetric" not in kinds:
        raise ConfigError(
            f"val_evaluator uses {kinds[0] if kinds else 'nothing'}",
            "tinymim segment scores with SegMetric, at each photo's own size",
            'use val_evaluator = dict(type="SegMetric"), or MMSegmentation\'s own tools',
        )
    loaders = {name: cfg.get(name) for name in ("train_dataloader", "val_dataloader", "test_dataloader")}
    for name, loader in loaders.items():
        dataset = loader.get("dataset") if isinstance(loader, dict) else None
        kind = dataset.get("type") if isinstance(dataset, dict) else None
        if kind != "TinyMIMSegDataset":
            raise ConfigError(
                f"{name} uses {kind or 'no dataset'}",
                "tinymim segment reads folders in ADE20K layout through TinyMIMSegDataset",
                "use TinyMIMSegDataset, or MMSegmentation's own tools",
            )
        for key, fits, words in (
            ("split", loader.dataset.get("split") in ("train", "val"), "'train' or 'val'"),
            ("pipeline", bool(loader.dataset.get("pipeline")), "a list of transforms"),
        ):
            if not fits:
                raise ConfigError(
                    f"{name}.dataset.{key}={loader.dataset.get(key)!r}", f"it must be {words}", "correct the config"
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
    count = len(layout.classes)
    others = sorted({str(head.num_classes) for head in heads(cfg) if head.get("num_classes") not in (None, count)})
    ours = cfg.filename and Path(cfg.filename).resolve().parent in map(Path.resolve, own_configs())
    if others and not ours:
        say(f"note: the heads get the {count} classes of {layout.root}, in place of num_classes={' and '.join(others)}")
    for head in heads(cfg):
        head.num_classes = count
    return layout


def set_pseudo(cfg: Config, layout: Layout, pseudo: str | Path | None) -> tuple[str, int]:
    """Add pseudo-labelled photos to the training loader; return what to say of them, and the photos of an epoch.

    Args:
        cfg: The config, changed in place; it may name them itself.
        layout: The labelled folder.
        pseudo: ``LAYOUT`` or ``LAYOUT=WEIGHT``.

    Raises:
        ConfigError: a weight that is not possible.
        DataError: the folder is wrong, or has other classes.
    """
    dataset = cfg.train_dataloader.dataset
    if pseudo is not None:
        dataset.pseudo = parse_pseudo(pseudo)
    if (found := dataset.get("pseudo")) is None:
        return "", len(layout.train)
    if not isinstance(found, dict) or {*found} != {"data_root", "weight"}:
        raise ConfigError(f"dataset.pseudo={found!r}", "it is dict(data_root=..., weight=...)", "use --pseudo LAYOUT")
    if not (isinstance(found["weight"], int | float) and 0 < found["weight"] <= MOST_WEIGHT):
        raise ConfigError(
            f"--pseudo {found['data_root']}={found['weight']}",
            "the weight says how often a pseudo-labelled photo is drawn compared with a labelled one",
            f"use a number above 0, at most {MOST_WEIGHT}, e.g. --pseudo {found['data_root']}=0.5",
        )
    others, _ = read_pseudo(found["data_root"], layout)
    if same := _sizes(others.train) & _sizes(layout.val):
        tell(
            f"{len(same)} photos of {others.root} have the name and size of validation photos, e.g. {min(same)[0]}: "
            "the scores on these will be too good"
        )
    drawn = pseudo_per_pass(len(others.train), found["weight"])
    said = f" and {len(others.train)} pseudo-labelled photos of {others.root}, {drawn} of them in each pass"
    return said, len(layout.train) + drawn


def parse_pseudo(text: str | Path) -> dict[str, Any]:
    """``LAYOUT[=WEIGHT]`` as the ``pseudo`` of :class:`~tinymim.seg.dataset.TinyMIMSegDataset`."""
    folder, equals, weight = str(text).rpartition("=")
    if not equals or Path(text).is_dir():
        return dict(data_root=str(text), weight=1.0)
    try:
        return dict(data_root=folder, weight=float(weight))
    except ValueError:
        return dict(data_root=folder, weight=weight)


def _sizes(pairs: Sequence[Pair]) -> set[tuple[str, int]]:
    """Name and bytes of every photo."""
    return {(photo.name, photo.stat().st_size) for photo, _ in pairs}


def heads(cfg: Config) -> list[Any]:
    """The nodes of all heads of a config; MMSegmentation accepts one head or a list under each name."""
    found = [cfg.model.get(name) for name in ("decode_head", "auxiliary_head")]
    return [head for part in found if part for head in (part if isinstance(part, list) else [part])]


def set_device(cfg: Config, device: str | None, amp: bool, strategy: str | None = None) -> str:
    """Choose the device, the precision and the processes; SyncBN only on several GPUs. Return "cpu" or "cuda".

    Raises:
        ConfigError: no such device, or fsdp on one process.
    """
    kind = compat.use_device(device)
    check_strategy(strategy, compat.launched_processes())
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
    if strategy == "fsdp":
        cfg.model_wrapper_cfg = dict(type=ShardedModel.__name__)
    elif (cfg.get("model_wrapper_cfg") or {}).get("type") == ShardedModel.__name__:  # of a run's config.py
        cfg.model_wrapper_cfg = None
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
    """Text of a config, which :func:`tinymim.literals.read_literals` reads back."""
    return "".join(
        f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}\n" for key, value in cfg.to_dict().items()
    )


def name_run(cfg: Config) -> Config:
    """The config as ``config.py``, with a unique experiment name (MMEngine shares state between equal names)."""
    named = RunConfig(cfg.to_dict(), cfg_text="# tinymim", filename="config.py")
    named.experiment_name = f"tinymim_seg_{next(_runs)}"
    return named


def say(text: str) -> None:
    """Log a message on the first process."""
    if compat.is_first_process():
        progress.say(text)
