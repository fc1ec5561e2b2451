"""timm's Hiera and Swin as frozen teachers; they can be read by the methods for students of the same family."""

import os
from typing import Any

import timm

from tinymim.files import sha256_file
from tinymim.models.checkpoints import load_weights, read_checkpoint
from tinymim.models.hierarchical import Hierarchical
from tinymim.models.teachers import Teacher, _create_timm, register_teacher
from tinymim.models.timm_names import check_name
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weight_files import weights_file


@register_teacher("timm/hiera_")
@register_teacher("timm/swin_")
def hierarchical_teacher(
    name: str,
    *,
    img_size: int,
    weights: str | os.PathLike[str] | None,
    num_heads: int | None,
    pretrained: bool,
    grid: int | None,
) -> Teacher:
    """A model of timm's by name; timm defines its heads.

    ``weights`` may be timm's file, ours, Meta's of Hiera with its decoder (``mae_hiera_base_224.pth``), or the authors'
    of Swin and SimMIM: what is not the encoder is dropped, and named in the report.
    """
    timm_name = name.removeprefix("timm/")
    check_name(timm_name, download=pretrained and weights is None)
    model = Hierarchical(timm_name.split(".")[0], img_size=img_size)
    if weights is not None:
        load_weights(model, read_checkpoint(weights))
    elif pretrained:
        native = _create_timm(name, None, True, num_classes=0)
        load_weights(model, native.state_dict(), say=False)
    cfg: Any = timm.get_pretrained_cfg(timm_name)
    return Teacher(
        model.eval().requires_grad_(False),
        name,
        tuple(getattr(cfg, "mean", None) or IMAGENET_MEAN),
        tuple(getattr(cfg, "std", None) or IMAGENET_STD),
        None if weights is None else sha256_file(weights_file(weights)),
    )
