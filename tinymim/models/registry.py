"""Named models: ``tinymim.create_model``; ``timm_entries.py`` puts the same names into timm's registry."""

import os
from collections.abc import Mapping
from typing import Any

from tinymim.errors import ConfigError, did_you_mean
from tinymim.models.backbone import backbone_names, build_backbone, register_backbone
from tinymim.models.checkpoints import load_weights, stored_shape
from tinymim.models.formats import describe, read_checkpoint
from tinymim.models.hierarchical import name_of  # (registers its names)
from tinymim.models.vit import ViT
from tinymim.progress import say

__all__ = ["create_model", "model_names"]

SIZES: dict[str, dict[str, Any]] = {
    "tinymim_vit_tiny": dict(embed_dim=192, num_heads=3),
    "tinymim_vit_small": dict(embed_dim=384, num_heads=6),
    "tinymim_vit_base": dict(embed_dim=768, num_heads=12),
    "tinymim_vit_star_tiny": dict(embed_dim=192, num_heads=12, dist_token=True, last_dim=1280),
}


@register_backbone(*SIZES)
def _named_vit(name: str, **arguments: Any) -> ViT:
    """A ViT of a named size."""
    try:
        return ViT(**(SIZES[name] | arguments))
    except TypeError as error:
        raise ConfigError(f"cannot build {name}", str(error), "see help(tinymim.models.ViT) for the keywords") from None


_named_vit.more_arguments = lambda name: ViT


def model_names() -> list[str]:
    """Names of our own models; :func:`create_model` accepts all of ``tinymim.models.backbone.backbone_names()``."""
    return list(SIZES)


def create_model(
    name: str,
    img_size: int | tuple[int, int] = 224,
    checkpoint: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Any:
    """Build a backbone by name.

    Args:
        name: ``tinymim_vit_tiny`` (192 wide, 3 heads), ``_small`` (384, 6), ``_base`` (768, 12) or ``_star_tiny``
            (TinyMIM*-T: 192, 12 heads, distillation token, 1280-wide last layer); 12 blocks, patch 16. Or timm's name
            of a hierarchical model, e.g. ``hiera_tiny_224``, ``tiny_vit_5m_224`` or
            ``swin_tiny_patch4_window7_224``.
        img_size: Pixels at which the position embedding is stored.
        checkpoint: File to load through :func:`tinymim.load_weights`.
        overrides: Any keyword of :class:`ViT`, or of timm's class.

    Returns:
        :class:`ViT`, or another :class:`~tinymim.models.backbone.Backbone`.

    Raises:
        ConfigError: unknown name or keyword.
        CheckpointError: the file does not fit.
    """
    if name not in backbone_names():
        raise ConfigError(
            f"unknown model {name!r}",
            f"the models are {', '.join(SIZES)}; and timm's hiera_*, tiny_vit_*, swin_*",
            did_you_mean(name, backbone_names()),
        )
    model = build_backbone(name, img_size=img_size, **overrides)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def create_model_for(
    name: str,
    file: str | os.PathLike[str] | None,
    *,
    img_size: int | tuple[int, int],
    num_heads: int | None = None,
    arguments: Mapping[str, Any],
) -> Any:
    """Build a named model; with a file of weights, in the file's shape and with its weights.

    Args:
        name: As for :func:`create_model`; a file's width, depth and patch size override it. A plain ViT's name also
            gives way to another backbone that the file holds.
        file: Weights of an encoder, or None.
        img_size: Pixels at which the position embedding is stored.
        num_heads: Heads per block; None: the file's, else the model's. A number other than the file's regroups the same
            weights.
        arguments: Other keywords of the model.

    Raises:
        CheckpointError: no such file, or one that does not fit.
        ConfigError: an unknown head count, or arguments that contradict the file.
    """
    heads = {"num_heads": num_heads} if num_heads else {}
    if file is None:
        return create_model(name, img_size=img_size, **{**arguments, **heads})
    checkpoint = read_checkpoint(file)
    known = checkpoint.config.get("name") or (None if checkpoint.config else name_of(checkpoint.state))
    if name not in SIZES or known:
        if name in SIZES:
            say(f"note: {file} is {known}, which is used, not {name}")
            name = str(known)
        shape = {key: value for key, value in checkpoint.config.items() if key not in ("name", "img_size")}
        model = create_model(name, img_size=img_size, **{**(shape if name == known else {}), **arguments, **heads})
        load_weights(model, checkpoint)
        return model
    shape = stored_shape(checkpoint)
    stored = shape.pop("num_heads", None)
    named = {"depth": 12, **SIZES[name], **arguments}
    for key in ("rel_pos_bias", "init_values"):  # parts that start without effect may be added
        if arguments.get(key) and not shape.get(key):
            shape[key] = arguments[key]
    if wrong := [key for key in shape if key in arguments and arguments[key] != shape[key]]:
        raise ConfigError(
            f"student_args.{wrong[0]}={arguments[wrong[0]]} contradicts the student file",
            f"{file} has {shape[wrong[0]]}",
            f"leave student_args.{wrong[0]} out: the file decides it",
        )
    if any(shape.get(key, named[key]) != named[key] for key in ("embed_dim", "depth")):
        say(f"note: {file} is {describe(checkpoint.state, checkpoint.config)}; its shape is used, not {name}'s")
    if stored is None and shape.get("embed_dim") == named["embed_dim"]:
        stored = named["num_heads"]  # a published file, and the named model has its size
    if stored is None and num_heads is None:
        raise ConfigError(
            f"the head count of {file} is unknown",
            f"weights do not show it; the file looks like {describe(checkpoint.state)}",
            "add --num-heads N (usual: 3 at width 192, 6 at 384, 12 at 768, 16 at 1024)",
        )
    if stored and num_heads and stored != num_heads:
        say(f"note: {file} has {stored} heads per block; its weights are regrouped to {num_heads}")
        checkpoint = checkpoint.regrouped(num_heads)
    shape["num_heads"] = num_heads or stored
    model = create_model(name, img_size=img_size, **{**arguments, **shape})
    load_weights(model, checkpoint, new_dist_token=model.dist_token is not None)
    return model
