"""A classifier on our ViT, under timm's key names, as in MAE's and TinyMIM's fine-tuning (TinyMIM*-T: our reading).

Legend: B = batch, P = prefix tokens (class, distillation), N = patches, D = width, K = classes.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.compat import is_first_process
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import versions
from tinymim.models.backbone import Layers, decay_groups
from tinymim.models.checkpoints import model_from_checkpoint, save_torch, unfinished
from tinymim.models.formats import Checkpoint, describe
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT

HEADS = ("fc_norm", "head", "head_dist")


class Classifier(nn.Module):
    """ViT -> mean of the patch tokens -> LayerNorm -> linear layer; the ViT's own final norm is left out, as published.

    With a distillation token there is a second linear layer on it, and the logits of the two are averaged in evaluation
    (DeiT, arXiv 2012.12877, section 3). The authors' code of TinyMIM*-T is not published; its files hold ``conv1x1``,
    ``fc_norm``, ``head`` and ``head_dist``. Our reading: ``conv1x1`` (LayerNorm, Linear to 1280, GELU) acts on every
    token, as in their segmentation code, and one ``fc_norm`` of that width precedes both heads.

    Args:
        backbone: The ViT; its parameters are shared, it is not changed.
        num_classes: K.

    Raises:
        ConfigError: the backbone is not a ViT.
    """

    def __init__(self, backbone: ViT, num_classes: int) -> None:
        super().__init__()
        if not isinstance(backbone, ViT):
            raise ConfigError(
                f"a classifier cannot be built on a {type(backbone).__name__}",
                "it reads the patch tokens of a plain vision transformer",
                "choose e.g. tinymim_vit_tiny",
            )
        self.backbone = backbone.without_norm() if backbone.config["last_dim"] is None else backbone
        self.num_classes = num_classes
        width = backbone.num_features
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = _linear(width, num_classes)
        self.head_dist = _linear(width, num_classes) if backbone.dist_token is not None else None

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W), normalised -> logits (B, K) of the class head and of the second head (None without)."""
        x_BTD = self.backbone(images)
        logits_BK = self.head(self.fc_norm(x_BTD[:, self.backbone.num_prefix_tokens :].mean(dim=1)))
        return logits_BK, None if self.head_dist is None else self.head_dist(self.fc_norm(x_BTD[:, 1]))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, K); with two heads their mean."""
        class_BK, dist_BK = self.answers(images)
        return class_BK if dist_BK is None else (class_BK + dist_BK) / 2

    def layer_groups(self, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups with ``lr_scale`` = layer_decay ** (depth + 1 - layer), which timm's schedulers multiply by.

        The backbone defines the layers and what takes no weight decay; the heads are the last layer.
        """
        layers = Layers(self.backbone)
        groups = decay_groups(
            self.named_parameters(),
            lambda name: layers.of(name.removeprefix("backbone.")),
            self.backbone.no_weight_decay(),
        )
        return [
            {
                "params": group.params,
                "lr_scale": layer_decay ** (layers.above - group.layer),
                "weight_decay": weight_decay if group.decayed else 0.0,
            }
            for group in sorted(groups, key=lambda group: (group.layer, not group.decayed))
        ]


def _linear(width: int, num_classes: int) -> nn.Linear:
    """A head with weights close to zero (MAE's fine-tuning: std 2e-5)."""
    layer = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(layer.weight, std=2e-5)
    nn.init.zeros_(layer.bias)
    return layer


def save_classifier(
    model: Classifier, path: str | os.PathLike[str], classes: Sequence[str], meta: dict[str, Any] | None = None
) -> None:
    """Write ``{"model": tensors under timm's names, "meta": plain dict}``; other commands read it as a student file.

    Args:
        model: The classifier.
        path: File to write, atomically.
        classes: Names of the K classes.
        meta: Added to name, constructor arguments, classes, mean, std and versions.
    """
    state = {k.removeprefix("backbone."): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_torch(
        {
            "model": state,
            "meta": {
                "name": "Classifier",
                "config": model.backbone.config,
                "classes": [*classes],
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "recipe": None,
                "versions": versions(),
            }
            | (meta or {}),
        },
        path,
    )


def load_classifier(path: str | os.PathLike[str], *, num_heads: int | None = None) -> tuple[Classifier, Checkpoint]:
    """Build the classifier of a file: ours, or the published fine-tuned layouts (TinyMIM-FT, TinyMIM-FT-Tstar).

    Args:
        path: The file.
        num_heads: Heads per block, for files that do not store it.

    Returns:
        The classifier, in evaluation mode, and the file.

    Raises:
        CheckpointError: the file holds no classifier, or one with another head layout.
    """
    backbone, checkpoint = model_from_checkpoint(path, num_heads=num_heads, say=False)
    state = checkpoint.state
    if "head.weight" not in state or "fc_norm.weight" not in state:
        raise CheckpointError(
            f"{path} holds no classifier",
            "a fine-tuned model has head.weight and fc_norm.weight (mean of the patch tokens)",
            f"train one: tinymim finetune --student {path} --data TRAIN --val-data VAL "
            "(a segmentor.pth is scored by tinymim segment --test)",
        )
    model = Classifier(backbone, len(state["head.weight"]))
    fill_heads(model, state)
    if is_first_process():
        print(
            f"loaded the classifier {path}: {describe(state, checkpoint.config)}, {model.num_classes} classes",
            *(f"  note: {note}" for note in unfinished(checkpoint)),
            sep="\n",
        )
    return model.eval(), checkpoint


def fill_heads(model: Classifier, state: dict[str, Tensor]) -> None:
    """Copy ``fc_norm``, ``head`` and ``head_dist`` into a classifier.

    Raises:
        CheckpointError: one of them is missing or has another shape.
    """
    own = {k: v for k, v in model.state_dict().items() if k.startswith(HEADS)}
    for key, value in own.items():
        if key not in state or state[key].shape != value.shape:
            found = tuple(state[key].shape) if key in state else "absent"
            raise CheckpointError(
                f"{key} is {found} in the file and {tuple(value.shape)} in the classifier",
                "the file's head has another layout (possibly of unpublished code)",
                "fine-tune its encoder again: tinymim finetune --student FILE",
            )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
