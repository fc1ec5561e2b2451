"""A classifier whose predictions are the targets: any timm model with a head, or a classifier file of ours.

Legend: B = photos, S = side of the views, T = side the model sees, C = classes.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.errors import CheckpointError, ConfigError
from tinymim.models.checkpoints import check_values, read_checkpoint
from tinymim.models.classifier import load_classifier
from tinymim.models.formats import describe
from tinymim.models.teachers import _create_timm, state_sha256
from tinymim.models.timm_names import check_name
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD


@dataclass
class LogitTeacher:
    """A frozen classifier that sees views as uint8 and normalises them itself.

    Attributes:
        model: The network.
        name: ``timm/NAME``, or the file's name.
        mean: Of each channel, for values in 0..1.
        std: The same.
        size: T, pixels.
        classes: C.
        sha256: Of its tensors, whatever file they came from.
        class_names: Where its file stores them.
    """

    model: nn.Module
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    classes: int
    sha256: str
    class_names: Sequence[str] | None = None

    def probabilities(self, views_B3SS: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Softmax (B, C) in float32 of views, uint8 or 0..1, without gradients; the network computes in ``dtype``."""
        row = (1, 3, 1, 1)
        x_B3TT = views_B3SS if views_B3SS.is_floating_point() else views_B3SS.float() / 255
        if x_B3TT.shape[-1] != self.size:
            x_B3TT = F.interpolate(x_B3TT, size=(self.size, self.size), mode="bicubic", antialias=True)
        x_B3TT = (x_B3TT - x_B3TT.new_tensor(self.mean).view(row)) / x_B3TT.new_tensor(self.std).view(row)
        with torch.no_grad(), torch.autocast(x_B3TT.device.type, dtype, enabled=dtype != torch.float32):
            logits_BC = self.model(x_B3TT)
        return logits_BC.float().softmax(-1)  # half-precision softmax would make ties of small classes


def load_logit_teacher(
    name: str, *, weights: str | os.PathLike[str] | None = None, pretrained: bool = True
) -> LogitTeacher:
    """Build a classifier, frozen and in evaluation mode.

    Args:
        name: ``timm/NAME``, or a classifier file (``tinymim finetune``).
        weights: File to load into a timm model instead of downloading; it defines the number of classes.
        pretrained: False keeps random weights (a plan's timing).

    Raises:
        ConfigError: unknown timm model, one without a classifier, or weights for a file.
        CheckpointError: the weights are missing, cannot be downloaded, or do not fit.
    """
    class_names = None
    if name.startswith("timm/"):
        check_name(name, download=pretrained and weights is None)
        model: Any = _create_timm(name, weights, pretrained)
        if model.num_classes < 1:
            raise ConfigError(
                f"{name} has no classifier",
                "its weights were trained without labels",
                "choose one that was fine-tuned: its tag ends in _in1k or _in22k (tinymim list teachers)",
            )
        if weights is not None:
            model = _load(name, model, weights)
        cfg = model.pretrained_cfg
        size = int(cfg.get("input_size", (3, 224, 224))[-1])
        mean, std = tuple(cfg.get("mean") or IMAGENET_MEAN), tuple(cfg.get("std") or IMAGENET_STD)
        classes = int(model.num_classes)
    else:
        if weights is not None:
            raise ConfigError(
                "--teacher-weights needs a timm teacher",
                f"{name} is a file and has its own weights",
                "leave --teacher-weights out, or give --teacher timm/NAME",
            )
        model, file = load_classifier(name)
        mean = tuple(file.meta.get("mean") or IMAGENET_MEAN)
        std = tuple(file.meta.get("std") or IMAGENET_STD)
        size, classes, name = int(model.backbone.img_size[0]), int(model.num_classes), os.path.basename(name)
        class_names = file.meta.get("classes")
    model = model.eval().requires_grad_(False)
    return LogitTeacher(model, name, mean, std, size, classes, state_sha256(model), class_names)


def _load(name: str, model: Any, weights: str | os.PathLike[str]) -> Any:
    """The model with the weights and the number of classes of a file, under timm's names or those it converts.

    Raises:
        CheckpointError: the file belongs to another model, or has no classifier.
    """
    checkpoint = read_checkpoint(weights)

    def other(why: str) -> CheckpointError:
        found = f"the file looks like {describe(checkpoint.state)}; {why}"
        fix = "give the weights of this model with its classifier, or name the model: --teacher timm/NAME"
        return CheckpointError(f"{weights} does not fit {name}", found, fix)

    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(dict(checkpoint.state), model) if convert else checkpoint.state
        heads = model.pretrained_cfg.get("classifier") or "head"
        head = heads if isinstance(heads, str) else heads[0]
        if f"{head}.weight" not in state:
            raise other(f"it has no {head}.weight")
        if (classes := len(state[f"{head}.weight"])) != model.num_classes:
            model = timm.create_model(name.removeprefix("timm/"), num_classes=classes)
            state = convert(dict(checkpoint.state), model) if convert else checkpoint.state
        for key, value in state.items():
            check_values(key, value, checkpoint.path)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise other(
            str(error).strip().splitlines()[-1].strip()[:200] if str(error).strip() else "its tensors differ"
        ) from error
    return model
