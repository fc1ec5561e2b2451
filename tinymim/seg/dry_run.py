"""What training a segmentor costs, before it starts: one step on random pixels."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.utils.flop_counter import FlopCounterMode

from tinymim import compat
from tinymim.engine.model import saved_bytes
from tinymim.engine.plan import SUSTAINED
from tinymim.seg.config import find_config, merge_options, set_data, set_device

COUNT = 2  # crops of the step that is measured: batch norm needs more than one


@dataclass(frozen=True)
class SegCost:
    """Cost of a training run.

    Attributes:
        parameters: Trained ones.
        bytes_per_crop: What autograd keeps of a crop.
        gib: Memory of a process: weights, gradients, AdamW's two moments, activations of its batch (and half as much).
        flop_per_crop: Forward and backward.
        seconds_per_crop: Of this machine.
        batch: Crops a step and process.
        processes: As launched.
        steps: Of the schedule.
        size: Of the crops, pixels.
        device: "cpu" or "cuda".
    """

    parameters: int
    bytes_per_crop: int
    gib: float
    flop_per_crop: float
    seconds_per_crop: float
    batch: int
    processes: int
    steps: int
    size: tuple[int, int]
    device: str

    def __str__(self) -> str:
        crops = self.steps * self.batch * self.processes
        hours, whole = self.seconds_per_crop * crops / 3600, self.flop_per_crop * crops
        return (
            f"{self.steps} steps of {self.batch} crops of {self.size[0]}x{self.size[1]} on each of {self.processes} "
            f"process(es)\ndry run: {self.parameters / 1e6:.2f} M trained parameters; about {self.gib:.1f} GiB a "
            f"process ({self.bytes_per_crop / 2**20:.0f} MiB a crop); about {hours:.1f} hours on such a {self.device} "
            f"({1 / self.seconds_per_crop:.2f} crops/s without data loading and scoring)\n"
            f"{self.flop_per_crop / 1e9:.1f} GFLOP a crop, forward and backward: {whole / 1e18:.3g} EFLOP, "
            f"{whole / SUSTAINED / 3600:.1f} hours at {SUSTAINED / 1e12:.0f} TFLOP/s (a third of a V100's peak), over "
            "the number of GPUs"
        )


def estimate_segmentor(
    config: str | Path | Config,
    *,
    data_root: str | Path | None = None,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
) -> SegCost:
    """Measure one training step of a config on random pixels; nothing is written, no weights are loaded.

    Args:
        config: As in :func:`tinymim.seg.train_segmentor`.
        data_root: Labelled folder, for the number of classes; default: the config's.
        device: As in :func:`tinymim.seg.train_segmentor`.
        cfg_options: Overrides of the config.
        ignore_label: As in :func:`tinymim.seg.train_segmentor`.
        reduce_zero_label: As in :func:`tinymim.seg.train_segmentor`.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    cfg = find_config(config)
    merge_options(cfg, cfg_options)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label, splits=())
    kind = set_device(cfg, device, amp=False)
    init_default_scope("mmseg")
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).to(kind).train()
    height, width = cfg.model.data_preprocessor.size

    def loss() -> torch.Tensor:
        photos = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(COUNT)]
        labels = torch.randint(0, len(layout.classes), (1, height, width))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=labels)) for _ in photos]
        data = model.data_preprocessor({"inputs": photos, "data_samples": samples}, True)
        losses = model.loss(data["inputs"], data["data_samples"])
        return model.parse_losses(losses)[0]

    per_crop = saved_bytes(model, loss) // COUNT
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    began = time.monotonic()
    loss().backward()
    if kind == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = int(cfg.train_dataloader.batch_size)
    need = 4 * sum(p.numel() for p in model.parameters()) + 12 * trained + 1.5 * per_crop * batch
    return SegCost(
        trained,
        per_crop,
        need / 2**30,
        counter.get_total_flops() / COUNT,
        seconds / COUNT,
        batch,
        compat.launched_processes(),
        int(cfg.train_cfg.max_iters),
        (height, width),
        kind,
    )
