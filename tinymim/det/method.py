"""The model of detection's training, its recipe keys and its schedule."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from tinymim.det.detector import Detector
from tinymim.distill.method import register_method
from tinymim.distill.recipe_keys import Choice, Key, Kind, Number
from tinymim.engine.model import Trainable

SIZES = Kind(
    [32, 64, 128, 256, 512], types=(list, tuple), items=int, words="a list of five", example="[8,16,32,64,128]"
)
FACTORS = Kind((0.1, 2.0), types=(list, tuple), words="two factors", example="[0.5,1.5]")


@register_method("mask_rcnn", verb="detect", title="detect", base="_detect.py")
class DetectModel(Trainable):
    """Mask R-CNN's losses: objects and boxes of the proposals, classes, boxes and masks.

    Args:
        network: The detector; its backbone runs in the type of autocast, the rest in float32.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "num_heads": Number(None, least=1, whole=True),  # heads per block; None: the file's, else the model's
        "channels": Number(256, least=4, whole=True),  # of levels and heads
        "anchor_sizes": SIZES,  # pixels, at the strides 4, 8, 16, 32 and 64
        "masks": Choice(True, (True, False)),  # False: boxes only (Faster R-CNN)
        "scale_jitter": FACTORS,  # of the longer side, times img_size
        "layer_decay": Number(1.0, most=1, above=True),  # rate of a layer divided by that of the next one
        "warmup_steps": Number(250, whole=True),
        "drops": Kind((0.889, 0.963), types=(list, tuple), words="two shares of the steps", example="[0.8,0.95]"),
        "clip_grad": Number(1.0, above=True),  # largest norm of the gradient
    }

    def __init__(self, network: Detector) -> None:
        super().__init__(None)  # autocast is the backbone's own
        self.network = network

    @property
    def encoder(self) -> Detector:
        return self.network

    @property
    def learned(self) -> nn.Module:
        return self.network

    def forward(self, image: Tensor, target: list[dict[str, Tensor]], mode: str = "loss") -> dict[str, Tensor]:  # type: ignore[override]
        """Photos (B, 3, S, S) from 0 to 1 and their objects -> named losses and their sum ``loss``."""
        self.last_batch = {"image": image}
        found = self.network([*image], target)
        names = {name.removeprefix("loss_"): loss for name, loss in found.items()}
        return {**names, "loss": sum(names.values(), torch.zeros((), device=image.device))}

    def example(self, config: Any, count: int, place: str) -> dict[str, Any]:
        """Random photos with one object each."""
        S = config.img_size
        image = torch.rand(count, 3, S, S, device=place)
        box = torch.tensor([[S / 4, S / 4, 3 * S / 4, 3 * S / 4]], device=place)
        target: dict[str, Tensor] = {"boxes": box, "labels": torch.ones(1, dtype=torch.long, device=place)}
        if config.masks:
            target["masks"] = torch.ones(1, S, S, dtype=torch.uint8, device=place)
        return {"image": image, "target": [target] * count}


@HOOKS.register_module()
class StepSchedule(Hook):
    """The rate as a pure function of the step: linear warm-up, then a tenth after each drop; times ``lr_scale``."""

    def __init__(self, steps: int, warmup: int, drops: tuple[float, ...]) -> None:
        self.steps, self.warmup, self.drops = steps, warmup, drops

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        groups = runner.optim_wrapper.optimizer.param_groups
        drops = sum(batch_idx >= drop * self.steps for drop in self.drops)
        factor = min((batch_idx + 1) / max(self.warmup, 1), 1.0) * 0.1**drops
        for group in groups:
            group["lr"] = group["peak"] * factor
