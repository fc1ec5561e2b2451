"""A classifier on any backbone, under timm's key names: plain ViTs as in MAE's and TinyMIM's fine-tuning (TinyMIM*-T:
our reading), hierarchical models as timm's own.

Legend: B = batch, P = prefix tokens (class, distillation), N = patches, D = width, H, W = rows and columns of a map,
K = classes.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from tinymim.compat import is_first_process
from tinymim.errors import CheckpointError
from tinymim.files import versions
from tinymim.models.backbone import Backbone, Layers, decay_groups
from tinymim.models.checkpoints import check_values, model_from_checkpoint, save_torch, unfinished
from tinymim.models.formats import Checkpoint, State, describe
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT
from tinymim.progress import say

AUTHORS = (  # names of a hierarchical classifier's parts in its authors' files -> timm's
    (r"^norm_head\.", "head.norm."),  # TinyViT
    (r"^head\.projection\.", "head.fc."),  # Hiera
    (r"^head\.(weight|bias)$", r"head.fc.\1"),  # TinyViT, Swin
)


class Classifier(nn.Module):
    """Backbone -> mean over the photo -> LayerNorm -> linear layer.

    A plain ViT's patch tokens are averaged, and its own final norm is left out, as published. With a distillation token
    there is a second linear layer on it, and the logits of the two are averaged in evaluation (DeiT, arXiv 2012.12877,
    section 3). The authors' code of TinyMIM*-T is not published; its files hold ``conv1x1``, ``fc_norm``, ``head`` and
    ``head_dist``. Our reading: ``conv1x1`` (LayerNorm, Linear to 1280, GELU) acts on every token, as in their
    segmentation code, and one ``fc_norm`` of that width precedes both heads.

    Of any other backbone the map of the last stage is averaged. One with ``norm_first`` has the norm before the mean
    (Swin); ``norm_eps`` is the norm's epsilon.

    Args:
        backbone: The backbone; its parameters are shared, it is not changed.
        num_classes: K.

    Attributes:
        head_dist: The second linear layer, or None.
    """

    head: Any  # the linear layer, or a _MapHead around it
    head_dist: nn.Linear | None

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone: Any = backbone
        if not isinstance(backbone, ViT):
            width, eps = backbone.stage_info[-1].width, getattr(backbone, "norm_eps", 1e-6)
            first = getattr(backbone, "norm_first", False)
            self.norm = nn.LayerNorm(width, eps=eps) if first else nn.Identity()
            self.head = _MapHead(nn.Identity() if first else nn.LayerNorm(width, eps=eps), _linear(width, num_classes))
            self.head_dist = None
            return
        if backbone.config["last_dim"] is None:
            self.backbone = backbone.without_norm()
        width = backbone.num_features
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = _linear(width, num_classes)
        self.head_dist = _linear(width, num_classes) if backbone.dist_token is not None else None

    @property
    def last_layer(self) -> nn.Linear:
        """The linear layer of the class head: a row for each class."""
        return self.head.fc if isinstance(self.head, _MapHead) else self.head  # type: ignore[no-any-return]

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W), normalised -> logits (B, K) of the class head and of the second head (None without)."""
        if isinstance(self.head, _MapHead):
            return self.head(self.norm(self.backbone.forward_map(images).permute(0, 2, 3, 1))), None
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

        def layer(name: str) -> int:
            inner = name.removeprefix("backbone.")
            return layers.above if inner == name else layers.of(inner)

        groups = decay_groups(self.named_parameters(), layer, self.backbone.no_weight_decay())
        return [
            {
                "params": group.params,
                "lr_scale": layer_decay ** (layers.above - group.layer),
                "weight_decay": weight_decay if group.decayed else 0.0,
            }
            for group in sorted(groups, key=lambda group: (group.layer, not group.decayed))
        ]


class _MapHead(nn.Module):
    """Maps (B, H, W, D) -> logits (B, K), under the names of timm's classifier heads."""

    def __init__(self, norm: nn.Module, fc: nn.Linear) -> None:
        super().__init__()
        self.norm, self.fc = norm, fc

    def forward(self, x_BHWD: Tensor) -> Tensor:
        return self.fc(self.norm(x_BHWD.mean(dim=(1, 2))))


def _linear(width: int, num_classes: int) -> nn.Linear:
    """A head with weights close to zero (MAE's fine-tuning: std 2e-5)."""
    layer = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(layer.weight, std=2e-5)
    nn.init.zeros_(layer.bias)
    return layer


def save_classifier(
    model: Classifier, path: str | os.PathLike[str], classes: Sequence[str] | None, meta: dict[str, Any] | None = None
) -> None:
    """Write ``{"model": tensors under timm's names, "meta": plain dict}``; other commands read it as a student file.

    Args:
        model: The classifier.
        path: File to write, atomically.
        classes: Names of the K classes; none, or None: unknown.
        meta: Added to name, constructor arguments, classes, mean, std and versions.
    """
    state = {k.removeprefix("backbone."): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_torch(
        {
            "model": state,
            "meta": {
                "name": "Classifier",
                "config": model.backbone.config,
                "classes": [*classes] if classes else None,
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
    """Build the classifier of a file: ours, the published fine-tuned layouts (TinyMIM-FT, TinyMIM-FT-Tstar), or a
    hierarchical model of timm's, also under its authors' names.

    Args:
        path: The file.
        num_heads: Heads per block, for files that do not store it.

    Returns:
        The classifier, in evaluation mode, and the file.

    Raises:
        CheckpointError: the file holds no classifier, or one with another head layout.
    """
    backbone, checkpoint = model_from_checkpoint(path, num_heads=num_heads, say=False)
    heads = stored_heads(backbone, checkpoint)
    if heads is None:
        raise CheckpointError(
            f"{path} holds no classifier",
            "a fine-tuned model has head.weight and fc_norm.weight (mean of the patch tokens), a hierarchical one "
            "timm's norm and head.fc.weight",
            f"train one: tinymim finetune --student {path} --data TRAIN --val-data VAL "
            "(a segmentor.pth is scored by tinymim segment --test)",
        )
    model = from_heads(backbone, heads)
    if is_first_process():
        held = describe(checkpoint.state, backbone.config)
        say(f"loaded the classifier {path}: {held}, {model.num_classes} classes")
        for note in unfinished(checkpoint):
            say(f"  note: {note}")
    return model.eval(), checkpoint


def stored_heads(backbone: Backbone, checkpoint: Checkpoint) -> State | None:
    """The tensors of a file that :class:`Classifier` adds to its backbone, under its names; None: it is no classifier.

    Args:
        backbone: The backbone of the file, or of its kind.
        checkpoint: The file.
    """
    if isinstance(backbone, ViT):
        heads = {k: v for k, v in checkpoint.state.items() if k.startswith(("fc_norm.", "head.", "head_dist."))}
        return heads if {"head.weight", "fc_norm.weight"} <= heads.keys() else None
    heads = {}
    for key, value in checkpoint.state.items():
        for pattern, text in AUTHORS:
            key = re.sub(pattern, text, key)
        if key.startswith("norm.") and not getattr(backbone, "norm_first", False):
            key = f"head.{key}"  # Hiera
        if key.startswith(("norm.", "head.")):
            heads[key] = value
    return heads if "head.fc.weight" in heads and any(".norm." in f".{key}" for key in heads) else None


def count_classes(heads: State) -> int:
    """The number of classes that the tensors of a classifier's heads are of."""
    return len(heads["head.fc.weight" if "head.fc.weight" in heads else "head.weight"])


def from_heads(backbone: Backbone, heads: State) -> Classifier:
    """The classifier of a backbone and the heads of its file, as :func:`stored_heads` returns them.

    Raises:
        CheckpointError: see :func:`fill_heads`.
    """
    model = Classifier(backbone, count_classes(heads))
    fill_heads(model, heads)
    return model


def imagenet_names(count: int) -> list[str]:
    """WordNet ids of the ImageNet set with so many classes, as timm lists them; empty if there is none."""
    subset = infer_imagenet_subset({"num_classes": count})
    return list(ImageNetInfo(subset).label_names()) if subset else []


def fill_heads(model: Classifier, heads: State) -> None:
    """Copy the tensors of a file's classifier into one of as many classes.

    Args:
        model: The classifier.
        heads: As :func:`stored_heads` returns them.

    Raises:
        CheckpointError: one of them is missing, has another shape, or holds no finite numbers.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    for key, value in own.items():
        if key not in heads or heads[key].shape != value.shape:
            found = tuple(heads[key].shape) if key in heads else "absent"
            raise CheckpointError(
                f"{key} is {found} in the file and {tuple(value.shape)} in the classifier",
                "the file's head has another layout (possibly of unpublished code)",
                "fine-tune its encoder again: tinymim finetune --student FILE",
            )
        check_values(key, heads[key], "")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(heads[key])


def start_from_classes(
    model: Classifier, checkpoint: Checkpoint, classes: Sequence[str], rows: Sequence[int] | None = None
) -> str:
    """Start a classifier's heads from a file's: a class from its row there, others from the mean of these rows.

    So the authors start on ImageNet-1k from ImageNet-22k (TinyViT, Swin).

    Args:
        model: The classifier, on the file's encoder.
        checkpoint: The file.
        classes: Names of the K classes.
        rows: The file's row of each class, -1: it has none. None: by name. A file without names has those of the
            ImageNet set with so many classes (WordNet ids), as timm lists them.

    Returns:
        A line that says what was found.

    Raises:
        CheckpointError: the file is no classifier of this kind, its classes are unknown, or it has none of these.
    """
    heads = stored_heads(model.backbone, checkpoint)
    if heads is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no classifier whose classes could be taken over",
            "the recipe starts from its rows (head=by_class)",
            "give a classifier as --student, or start with new rows: --cfg-options head=",
        )
    count = count_classes(heads)
    if rows is None:
        known = checkpoint.meta.get("classes") or imagenet_names(count)
        places = {name: row for row, name in enumerate(known[:count])}
        rows = [places.get(name, -1) for name in classes]
    index = torch.tensor(rows)
    found = index[index >= 0]
    if not len(found) or int(found.max()) >= count:
        few = ", ".join(classes[:3])
        raise CheckpointError(
            f"none of the {len(classes)} classes of the photos ({few}, ...) is among the {count} of {checkpoint.path}"
            if not len(found)
            else f"row {int(found.max())} of a file of {count} classes",
            "sub-folders of ImageNet are named by wnid (n01440764); our own files store the names of their classes",
            "name the row of each class: --cfg-options head=ROWS.txt (a number a line, -1: none), or start with new "
            "rows: --cfg-options head=",
        )

    def pick(value: Tensor) -> Tensor:
        mean = value[found].mean(dim=0, keepdim=True)
        return torch.cat([value, mean])[index.where(index >= 0, torch.tensor(count))]

    perclass = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias", "head_dist.weight", "head_dist.bias")
    if model.head_dist is not None and "head_dist.weight" not in heads:  # both heads start alike
        heads |= {key.replace("head.", "head_dist."): heads[key] for key in ("head.weight", "head.bias")}
    fill_heads(model, {key: pick(value) if key in perclass else value for key, value in heads.items()})
    lost = f"; {len(rows) - len(found)} start from their mean" if len(found) < len(rows) else ""
    return f"{len(found)} of {len(rows)} classes start from their rows in {checkpoint.path}{lost}"
