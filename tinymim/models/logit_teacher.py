"""Classifiers that teach by their predictions: any timm model with a head, or a classifier file of ours.

One is opened in one way (official files are converted, their values are checked) and used in two: with its own classes
for a store (:class:`LogitTeacher`, known by the sha256 of its tensors), and with those of labelled photos for
fine-tuning (:class:`LabelTeacher`, known by that of its file). Records of runs hold these two.

Legend: B = photos, S = side of the views, T = side the model sees, C = classes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import sha256_file
from tinymim.models.checkpoints import check_values, read_checkpoint
from tinymim.models.classifier import load_classifier
from tinymim.models.formats import describe
from tinymim.models.teachers import _create_timm, renormalise, state_sha256
from tinymim.models.timm_names import check_name
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weight_files import weights_file

NORMALISATION = (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))


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
        """Softmax (B, C) in float32 of views, uint8 or in 0..1, no gradients; the network computes in ``dtype``."""
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
    found = _open(name, weights, pretrained)
    if not name.startswith("timm/"):
        name = os.path.basename(name)
    model = found.model.eval().requires_grad_(False)
    about = (found.mean, found.std, found.size, found.classes, state_sha256(model), found.class_names)
    return LogitTeacher(model, name, *about)


@dataclass
class LabelTeacher:
    """A frozen classifier that teaches fine-tuning.

    Attributes:
        model: The network; its outputs are in the order of the photos' classes.
        view: Prepares photos (B, 3, H, W) that are normalised as ImageNet's.
        name: As it was given.
        sha256: Of its file; None where timm downloaded it.
    """

    model: nn.Module
    view: Callable[[Tensor], Tensor]
    name: str
    sha256: str | None


def load_label_teacher(
    name: str,
    classes: Sequence[str],
    *,
    index: Sequence[int] | None = None,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
) -> LabelTeacher:
    """A classifier of any of timm's architectures, or a file of ``tinymim finetune``, as DeiT's teacher.

    Args:
        name: ``timm/NAME``, e.g. ``timm/regnety_160.deit_in1k``, a ``classifier.pth``, ``hf-hub:OWNER/NAME``.
        classes: Names of the photos' classes, in the order of their ids.
        index: Their positions among ImageNet's 1000 classes, if they all are such: a teacher of all 1000 can then teach
            them.
        weights: File to load into a timm model instead of downloading; it defines the number of classes.
        pretrained: False keeps random weights (``--dry-run`` only).

    Raises:
        ConfigError: unknown timm model, one without a classifier, weights for a file, or different classes.
        CheckpointError: the weights are missing, cannot be downloaded, or do not fit.
    """
    opened = _open(name, weights, pretrained, len(classes))
    model, found, known = opened.model, opened.classes, opened.class_names
    own = found == len(classes) and (weights is not None or not pretrained)
    if known is None and not own and found == 1000 and index is not None:
        model = nn.Sequential(model, _Columns(index))
    elif found != len(classes) or (known is None and not own and found == 1000):
        raise ConfigError(
            f"the teacher {name} has {found} classes, the photos have {len(classes)}"
            + (" that are not named as ImageNet's" if found == 1000 else ""),
            "its predictions would mean something else",
            "use a teacher trained on these classes; for ImageNet's, sub-folders are named by wnid (n01440764)",
        )
    elif known is not None and (other := [(a, b) for a, b in zip(known, classes, strict=True) if a != b]):
        raise ConfigError(
            f"the classes of the teacher {name} are not those of the photos",
            f"where it has {other[0][0]!r} they have {other[0][1]!r}: its predictions would mean something else",
            "use a teacher trained on these classes",
        )
    view = renormalise(opened.mean, opened.std, opened.size)
    sha256 = None if opened.file is None else sha256_file(opened.file)
    return LabelTeacher(model.eval().requires_grad_(False), view, name, sha256)


class _Columns(nn.Module):
    """Selects outputs of a classifier, in the order of the photos' classes."""

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.index = list(index)

    def forward(self, logits_BK: Tensor) -> Tensor:
        return logits_BK[:, self.index]


class _Opened(NamedTuple):
    """A classifier as it was opened; ``file``: None where timm downloaded it."""

    model: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    classes: int
    class_names: Sequence[str] | None
    file: Path | None


def _open(name: str, weights: str | os.PathLike[str] | None, pretrained: bool, wanted: int | None = None) -> _Opened:
    """A classifier with its weights; ``wanted``: classes of one that keeps random weights, default timm's."""
    if not name.startswith("timm/"):
        if weights is not None:
            raise ConfigError(
                "--teacher-weights needs a timm teacher",
                f"{name} is a file and has its own weights",
                "leave --teacher-weights out, or give --teacher timm/NAME",
            )
        model, file = load_classifier(name)
        mean, std = (tuple(file.meta.get(key) or default) for key, default in NORMALISATION)
        size, classes, names = int(model.backbone.img_size[0]), int(model.num_classes), file.meta.get("classes")
        return _Opened(model, mean, std, size, classes, names, Path(file.path))
    check_name(name, download=pretrained and weights is None)
    random = weights is None and not pretrained and wanted is not None
    network: Any = _create_timm(name, weights, pretrained, **({"num_classes": wanted} if random else {}))
    if network.num_classes < 1:
        raise ConfigError(
            f"{name} has no classifier",
            "its weights were trained without labels",
            "choose one that was fine-tuned: its tag ends in _in1k or _in22k (tinymim list teachers)",
        )
    if weights is not None:
        network = _load(name, network, weights)
    cfg = network.pretrained_cfg
    size = int((cfg.get("input_size") or (3, 224, 224))[-1])
    mean, std = (tuple(cfg.get(key) or default) for key, default in NORMALISATION)
    return _Opened(
        network, mean, std, size, int(network.num_classes), None, None if weights is None else weights_file(weights)
    )


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
