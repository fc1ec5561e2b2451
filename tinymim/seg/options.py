"""Options of a training that stand for several keys of its config: size, length, batch, class balance."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

from tinymim import compat
from tinymim.data.folders import Layout
from tinymim.data.label_files import spread
from tinymim.errors import ConfigError
from tinymim.seg.config import heads, say
from tinymim.seg.known import registered

BALANCES = ("weights", "ohem")
COUNTED_LABELS = 400  # labels whose pixels are counted for the weights of the classes
KEPT = 0.2  # share of a crop's pixels that OHEM keeps at least
SURE = 0.7  # OHEM leaves out pixels whose own class has at least this probability
PIPELINES = ("train_pipeline", "val_pipeline", "test_pipeline", "tta_pipeline")
LEAST_SIZE = 32
PARTS = 5  # validations of a run of which only the length is given


def set_size(cfg: Config, size: int | Sequence[int] | None) -> None:
    """Change the size of the training crops, and with it, by the same factor, the sizes that photos are resized to.

    Args:
        cfg: The config, changed in place.
        size: Side of a square crop, or (height, width), pixels; None: as it is.

    Raises:
        ConfigError: no size of a crop, or a config that crops nothing.
    """
    if size is None:
        return
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(isinstance(side, int) and side >= LEAST_SIZE for side in sides):
        raise ConfigError(
            f"--img-size {' '.join(map(str, sides))}",
            f"it is the side of the training crops, or their height and width, in pixels, at least {LEAST_SIZE}",
            "e.g. --img-size 512, or --img-size 360 480",
        )
    before = (cfg.model.get("data_preprocessor") or {}).get("size")
    if not (isinstance(before, list | tuple) and len(before) == 2 and all(before)):
        raise ConfigError(
            "--img-size and a config without a crop size",
            f"model.data_preprocessor.size is {before!r}",
            "set the sizes of the config with --cfg-options",
        )
    crop, old = tuple(sides), tuple(before)
    factor = crop[0] / old[0]
    for step in _transforms(cfg):
        if isinstance(step.get("scale"), list | tuple):
            step["scale"] = tuple(max(round(side * factor), 1) for side in step["scale"])
        if step.get("type") == "RandomCrop":
            step["crop_size"] = crop
    cfg.model.data_preprocessor.size = crop
    if cfg.get("crop_size"):
        cfg.crop_size = crop
    backbone = cfg.model.backbone
    if "img_size" in backbone and _pair(backbone.img_size) == old:
        backbone.img_size = crop
    test = cfg.model.get("test_cfg") or {}
    if test.get("mode") == "slide":
        across = [new / given for new, given in zip(crop, old, strict=True)]
        for key in ("crop_size", "stride"):
            test[key] = tuple(max(round(side * by), 1) for side, by in zip(_pair(test[key]), across, strict=True))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _transforms(cfg: Config) -> Iterator[Any]:
    """Every transform of every pipeline of a config, each once."""
    loaders = (cfg.get(f"{split}_dataloader") or {} for split in ("train", "val", "test"))
    todo: list[Any] = [*(cfg.get(name) for name in PIPELINES), *(loader.get("dataset") for loader in loaders)]
    seen: set[int] = set()
    while todo:
        node = todo.pop()
        if isinstance(node, list | tuple):
            todo += node
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            if "type" in node and "pipeline" not in node:
                yield node
            todo += [node[key] for key in ("pipeline", "transforms") if key in node]


def length_options(
    cfg: Config,
    photos: int,
    *,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
) -> dict[str, Any]:
    """Config keys of a run's length, batch and rate.

    A run of another length validates and saves at least five times.

    Args:
        cfg: The config.
        photos: Training photos of an epoch.
        epochs: Passes over the photos; parts are fine.
        max_steps: Optimizer steps, instead of epochs.
        batch_size: Global batch, split over the processes.
        lr: Peak learning rate of the optimizer.

    Raises:
        ConfigError: a value that cannot be, or both lengths.
    """
    options: dict[str, Any] = {}
    world = compat.launched_processes()
    if batch_size is not None:
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"--batch-size {batch_size}",
                f"it is the global batch, at least a photo for each of {world} process(es)",
                f"use a multiple of {world}",
            )
        options["train_dataloader.batch_size"] = batch_size // world
    if lr is not None:
        if not (0 < lr < math.inf):
            raise ConfigError(f"--lr {lr}", "a learning rate is above 0", "e.g. --lr 1e-3")
        options["optim_wrapper.optimizer.lr"] = lr
    if epochs is not None and max_steps is not None:
        raise ConfigError("--epochs and --max-steps", "each says how long the run is", "leave one of them out")
    if epochs is not None and not (0 < epochs < math.inf):
        raise ConfigError(f"--epochs {epochs}", "a run takes part of an epoch at least", "e.g. --epochs 50")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps {max_steps}", "a run takes at least one step", "e.g. --max-steps 2000")
    steps = max_steps
    if epochs is not None:
        batch = options.get("train_dataloader.batch_size", cfg.train_dataloader.batch_size) * world
        steps = max(math.ceil(epochs * photos / batch), 1)
    if steps is not None:
        options["train_cfg.max_iters"] = steps
        every = max(math.ceil(steps / PARTS), 1)
        options["train_cfg.val_interval"] = min(cfg.train_cfg.get("val_interval") or every, every)
        checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
        if checkpoint.get("interval"):
            options["default_hooks.checkpoint.interval"] = min(checkpoint["interval"], every)
    return options


def set_balance(cfg: Config, balance: str | None, layout: Layout) -> None:
    """Let rare classes or hard pixels count more.

    "weights": every cross-entropy weighs a class of frequency p by 1 / ln(1.02 + p) (ENet, arXiv 1606.02147, section
    5.2), scaled so that the mean over all pixels is 1. "ohem": online hard example mining (arXiv 1604.03540) by
    MMSegmentation's sampler: only pixels whose own class has a probability below 0.7, a fifth of the crop at least.

    Args:
        cfg: The config, changed in place.
        balance: One of :data:`BALANCES`; None: as the config says.
        layout: The labelled folder.

    Raises:
        ConfigError: an unknown word, or heads without such a loss.
    """
    if balance is None:
        return
    if balance not in BALANCES:
        raise ConfigError(f"--balance {balance}", f"it is one of {', '.join(BALANCES)}", "correct it")
    if balance == "ohem":
        others = [head.type for head in heads(cfg) if not _samples_pixels(head)]
        if others:
            raise ConfigError(
                f"--balance ohem and {others[0]}",
                "the loss of this head takes no sampler of pixels",
                "use --balance weights, or leave --balance out",
            )
        height, width = cfg.model.data_preprocessor.size
        for head in heads(cfg):
            head.sampler = dict(type="OHEMPixelSampler", thresh=SURE, min_kept=round(KEPT * height * width))
        return
    losses = [loss for head in heads(cfg) for loss in _weighable(head)]
    weights = class_weights(layout)
    for loss in losses:
        loss["class_weight"] = weights
    low, high = min(weights), max(weights)
    name = layout.classes[weights.index(high)]
    say(f"balance: classes weigh {low:.2f} to {high:.2f} ({name}), counted in {len(_counted(layout))} labels")


def _weighable(head: Any) -> list[Any]:
    """The losses of a head that take weights of classes, and pixels to ignore beside them.

    Raises:
        ConfigError: there are none.
    """
    losses = head.get("loss_decode")
    if _samples_pixels(head):  # tinymim.seg.loss computes it
        kind, found = "CrossEntropyLoss", [losses]
    else:
        kind, found = "OhemCrossEntropy", losses if isinstance(losses, list) else [losses]
    fits = [each for each in found if isinstance(each, dict) and each.get("type") == kind]
    if not fits or any(each.get("use_sigmoid") for each in fits):
        raise ConfigError(
            f"--balance weights and {head.type}",
            "this head names no cross-entropy over classes as its loss_decode",
            "leave --balance out, or set the weights of the config's own losses",
        )
    return fits


def _samples_pixels(head: Any) -> bool:
    """Whether a head computes its loss as MMSegmentation's base class does, which asks the sampler."""
    return all(getattr(kind, "loss_by_feat", None) is BaseDecodeHead.loss_by_feat for kind in registered(head.type))


def _counted(layout: Layout) -> Sequence[Any]:
    return spread(layout.train, COUNTED_LABELS)


def class_weights(layout: Layout) -> list[float]:
    """Weight of each class by its share of the labelled pixels; see :func:`set_balance`.

    Returns:
        As many as classes, rounded to 4 digits, so that they are the same on every machine.
    """
    pixels = np.zeros(len(layout.classes), np.int64)
    for _, path in _counted(layout):
        for number, count in layout.count(path).items():
            pixels[number] += count
    share = pixels / max(pixels.sum(), 1)
    weights = 1 / np.log(1.02 + share)
    return [round(float(weight), 4) for weight in weights / (share * weights).sum()]
