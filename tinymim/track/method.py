"""The model that is trained: a tracker with its losses; its learning rates and its elimination, step by step."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from tinymim.distill.method import register_method
from tinymim.distill.recipe_keys import Key, Kind, Number
from tinymim.engine.model import Trainable
from tinymim.engine.run_folder import bare
from tinymim.models.backbone import decay_groups
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.track.losses import track_losses
from tinymim.track.network import Tracker


@register_method("track", verb="track", title="track", base="_track.py")
class TrackModel(Trainable):
    """A tracker on uint8 crops, with the losses of :func:`~tinymim.track.losses.track_losses`.

    Args:
        network: The tracker.
        autocast: torch.bfloat16 or None.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "num_heads": Number(None, least=1, whole=True),  # heads per block, for a student file that does not store them
        "template_size": Number(128, least=16, most=1 << 12, whole=True, option=True),  # pixels; img_size: search crop
        "template_factor": Number(2.0, above=True, most=100),  # side of its square / root of the target's area
        "search_factor": Number(4.0, above=True, most=100),
        "eliminate_in": Kind(  # blocks, from 1; None: 4, 7 and 10 of 12 (the paper's), as far into other depths
            None, (list, tuple), int, "a list of blocks, or None", "[4,7,10]"
        ),
        "keep": Number(0.7, above=True, most=1),  # share of the search patches each of them keeps; 1: no elimination
        "keep_from": Number(20 / 300, most=1),  # share of the run after which the share kept falls from 1,
        "keep_to": Number(80 / 300, most=1),  # and after which it has come to `keep`: half a cosine
        "channels": Number(256, least=8, most=1 << 12, whole=True),  # of the centre head
        "samples": Number(60_000, least=1, whole=True),  # pairs of an epoch
        "gap": Number(200, whole=True),  # most frames between template and search crop
        "shift": Number(1.5),  # largest shift of the search crop, in roots of the target's area
        "scale": Number(0.5, most=2),  # standard deviation of the logarithm of its scale
        "backbone_lr": Number(0.1),  # rate of the backbone divided by that of the head
        "drop_at": Number(0.8, most=1),  # share of the run after which all rates are divided by 10
        "clip_grad": Number(0.1, above=True),  # largest norm of all gradients; None: not clipped
    }
    mean: Tensor
    std: Tensor

    def __init__(self, network: Tracker, *, autocast: torch.dtype | None = None) -> None:
        super().__init__(autocast)
        self.network = network
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def encoder(self) -> Tracker:
        """The tracker."""
        return self.network

    @property
    def learned(self) -> nn.Module:
        """The tracker."""
        return self.network

    def forward(self, image: Tensor, template: Tensor, box: Tensor, mode: str = "loss") -> dict[str, Tensor]:  # type: ignore[override]
        """Search crops (B, 3, S, S) and templates (B, 3, Z, Z), uint8, and boxes (B, 4) -> named losses."""
        self.last_batch = {"image": image, "template": template, "box": box}
        views = [(crop.float() / 255 - self.mean) / self.std for crop in (template, image)]
        with self.cast(image.device.type):
            maps = self.network(*views)
        return track_losses(maps, box)

    def example(self, config: Any, count: int, place: str) -> dict[str, Tensor]:
        """Random crops, and a box in their middle."""
        crops = {
            name: torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=place)
            for name, side in (("image", config.img_size), ("template", config.template_size))
        }
        return {**crops, "box": torch.tensor([[0.5, 0.5, 0.25, 0.25]], device=place).repeat(count, 1)}


def parameter_groups(network: Tracker, backbone_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups with ``lr_scale``: the backbone's at ``backbone_lr``; no decay on 1-D parameters and positions."""
    undecayed = ("template_pos", "search_pos", *network.backbone.no_weight_decay())
    groups = decay_groups(network.named_parameters(), lambda name: int(not name.startswith("backbone.")), undecayed)
    return [
        {
            "params": group.params,
            "lr_scale": 1.0 if group.layer else backbone_lr,
            "weight_decay": weight_decay if group.decayed else 0.0,
        }
        for group in sorted(groups, key=lambda group: (group.layer, not group.decayed))
    ]


@HOOKS.register_module()
class TrackSchedule(Hook):
    """Learning rates and the share of patches that is kept, as pure functions of the step.

    Args:
        steps: Steps of the run.
        warmup: Steps of a linear warm-up.
        peak: Rate of the head.
        drop_at: Share of the run after which rates are divided by 10.
        keep: Share kept in the end.
        keep_from: Share of the run until which all patches are kept.
        keep_to: Share of the run from which ``keep`` is.
    """

    def __init__(
        self, steps: int, warmup: int, peak: float, drop_at: float, keep: float, keep_from: float, keep_to: float
    ) -> None:
        self.steps, self.warmup, self.peak, self.drop_at = steps, warmup, peak, drop_at
        self.keep, self.keep_from, self.keep_to = keep, keep_from, keep_to

    def rate(self, step: int) -> float:
        """Rate of the head."""
        rate = self.peak * min((step + 1) / (self.warmup + 1), 1.0)
        return rate * (0.1 if step >= self.drop_at * self.steps else 1.0)

    def share(self, step: int) -> float:
        """Share of the search patches that is kept: 1, then half a cosine down to ``keep`` (OSTrack's code)."""
        done = (step / self.steps - self.keep_from) / max(self.keep_to - self.keep_from, 1e-9)
        return self.keep + (1 - self.keep) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        rate = self.rate(batch_idx)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        model: Any = bare(runner.model)
        model.network.keep_now = self.share(batch_idx)
