"""Cost of training a segmentor, measured before it starts by one step on random pixels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from tinymim import compat
from tinymim.engine.cost import TrainingCost, measure_cost
from tinymim.seg.checks import check_batch
from tinymim.seg.config import (
    building,
    find_config,
    merge_options,
    model_outline,
    set_data,
    set_device,
    set_pseudo,
    steps_of,
)
from tinymim.seg.distillation import load_teacher, set_teacher
from tinymim.seg.loss import tile_losses
from tinymim.seg.options import length_options, set_size
from tinymim.seg.shape import take_shape


class SegCost(TrainingCost):
    """Cost of training a segmentor, where an image is a crop; ``..._per_crop`` are other names of ``..._per_image``."""

    @property
    def bytes_per_crop(self) -> int:
        """``bytes_per_image``."""
        return self.bytes_per_image

    @property
    def flop_per_crop(self) -> float:
        """``flop_per_image``."""
        return self.flop_per_image

    @property
    def seconds_per_crop(self) -> float:
        """``seconds_per_image``."""
        return self.seconds_per_image


def estimate_segmentor(
    config: str | Path | Config,
    *,
    data_root: str | Path | None = None,
    student: str | Path | None = None,
    teacher_segmentor: str | Path | None = None,
    pseudo: str | Path | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    img_size: int | Sequence[int] | None = None,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
) -> SegCost:
    """Measure one training step of a config on random pixels; nothing is written, only a teacher's weights are loaded.

    Args:
        config: As in :func:`tinymim.seg.train_segmentor`.
        data_root: Labelled folder, for the number of classes; default: the config's.
        student: As in :func:`tinymim.seg.train_segmentor`; it decides the shape of a hierarchical backbone.
        teacher_segmentor: As in :func:`tinymim.seg.train_segmentor`: its passes and weights count.
        pseudo: As in :func:`tinymim.seg.train_segmentor`; it is checked, and changes no cost.
        epochs: As in :func:`tinymim.seg.train_segmentor`; so are ``max_steps``, ``batch_size``, ``lr``, ``img_size``.
        max_steps: Optimizer steps.
        batch_size: Global batch.
        lr: Peak learning rate; it changes no cost.
        img_size: Size of the crops.
        device: As in :func:`tinymim.seg.train_segmentor`.
        cfg_options: Overrides of the config.
        ignore_label: As in :func:`tinymim.seg.train_segmentor`.
        reduce_zero_label: As in :func:`tinymim.seg.train_segmentor`.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    cfg = find_config(config)
    set_size(cfg, img_size)
    merge_options(cfg, cfg_options)
    take_shape(cfg, student, None)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label, splits=())
    set_teacher(cfg, teacher_segmentor)
    photos = set_pseudo(cfg, layout, pseudo)[1]
    options = length_options(cfg, photos, epochs=epochs, max_steps=max_steps, batch_size=batch_size, lr=lr)
    if options:
        merge_options(cfg, options)
    kind = set_device(cfg, device, amp=False)
    cfg.model.backbone.init_cfg = None
    check_batch(cfg, model_outline(cfg))
    teacher = load_teacher(cfg, layout, kind)
    with building("model"):
        model = MODELS.build(cfg.model).to(kind).train()
    tile_losses(model)
    if teacher is not None:
        teacher.teach(model)
    height, width = crop_size(cfg)

    def loss(count: int) -> torch.Tensor:
        photos = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(count)]
        labels = torch.randint(0, len(layout.classes), (1, height, width))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=labels)) for _ in photos]
        data = model.data_preprocessor({"inputs": photos, "data_samples": samples}, True)
        losses = model.loss(data["inputs"], data["data_samples"])
        return model.parse_losses(losses)[0]

    batch = int(cfg.train_dataloader.batch_size)
    cost = measure_cost(
        model,
        loss,
        per_pass=batch,
        batch=batch,
        processes=compat.launched_processes(),
        steps=steps_of(cfg),
        size=(height, width),
        device=kind,
    )
    frozen = 0 if teacher is None else sum(p.nbytes for p in teacher.model.parameters()) / 2**30
    return SegCost(**{**vars(cost), "gib": cost.gib + frozen})


def crop_size(cfg: Config) -> tuple[int, int]:
    """Height and width (pixels) of a training batch: the pipeline's crops, padded to the size of the preprocessor."""
    padded = cfg.model.data_preprocessor.get("size") or (0, 0)
    pipeline = cfg.train_dataloader.dataset.get("pipeline", cfg.get("train_pipeline", []))
    crops = [step["crop_size"] for step in pipeline if step.get("type") == "RandomCrop"]
    crop = crops[-1] if crops else (0, 0)
    sides = [(each, each) if isinstance(each, int) else each for each in (padded, crop)]
    return max(sides[0][0], sides[1][0]), max(sides[0][1], sides[1][1])
