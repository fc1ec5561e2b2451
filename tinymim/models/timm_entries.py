"""Our named students in timm's registry: ``timm.create_model("tinymim_vit_tiny", num_classes=10, in_chans=1)``.

What is built is timm's own VisionTransformer, which computes the same from the same tensors: every argument and method
means what it means in timm. Only what that class lacks is built as our ViT, without timm's arguments.
"""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tinymim.errors import ConfigError, TinyMIMError
from tinymim.models.checkpoints import load_weights
from tinymim.models.formats import read_checkpoint
from tinymim.models.registry import SIZES, create_model
from tinymim.models.vit import ARGUMENTS, IMAGENET_MEAN, IMAGENET_STD

OURS = ("rel_pos_bias", "dist_token", "last_dim")  # what timm's class lacks
NEUTRAL = {"num_classes": 0, "in_chans": 3, "features_only": False}
default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=0,
            input_size=(3, 224, 224),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bicubic",
            first_conv="patch_embed.proj",
            classifier="head",
        )
        for name in SIZES
    }
)


def _entry(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """timm's calling convention, and ``checkpoint``: a file for :func:`tinymim.load_weights`.

    Raises:
        ConfigError: ``pretrained=True`` (there are no weights to download), or an argument that the model lacks.
        CheckpointError: the file does not fit.
    """
    if pretrained:
        raise ConfigError(
            f"{name} has no weights to download",
            "students come from 'tinymim distill'",
            f"timm.create_model({name!r}, checkpoint='runs/x/student.pth')",
        )
    if own := [key for key in OURS if {**SIZES[name], **kwargs}.get(key)]:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key, None)
        kwargs = {key: value for key, value in kwargs.items() if NEUTRAL.get(key, ...) != value}
        if wrong := set(kwargs) - {*ARGUMENTS, "drop_path_rate", "checkpoint"}:
            raise ConfigError(
                f"{name} with {own[0]} has no argument {min(wrong)!r}",
                f"timm's VisionTransformer lacks {own[0]}, so this is tinymim's ViT: a backbone without classifier",
                f"leave {min(wrong)} out, or use a model without {own[0]}",
            )
        return create_model(name, **kwargs)
    checkpoint = kwargs.pop("checkpoint", None)

    def build(**arguments: Any) -> VisionTransformer:
        model = VisionTransformer(**{**SIZES[name], "dynamic_img_size": True, "dynamic_img_pad": True, **arguments})
        shape = {key: value for key, value in arguments.items() if key in ARGUMENTS}
        start, target = create_model(name, **shape).state_dict(), model.state_dict()
        model.load_state_dict({k: v for k, v in start.items() if k in target and v.shape == target[k].shape}, False)
        if checkpoint is not None:
            file, patch = read_checkpoint(checkpoint), "patch_embed.proj.weight"
            if patch in file.state and (channels := arguments.get("in_chans", 3)) != 3:
                file.state[patch] = adapt_input_conv(channels, file.state[patch])  # as timm adapts its own
            load_weights(model, file)
        return model

    try:
        features = dict(out_indices=3, feature_cls="getter")  # the last three blocks, timm's default for its ViTs
        return build_model_with_cfg(build, name, False, feature_cfg=features, **kwargs)
    except TinyMIMError:
        raise
    except (TypeError, AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"cannot build {name}", f"{error}", "see help(timm.models.VisionTransformer) for the arguments"
        ) from error


@register_model
def tinymim_vit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Tiny/16, 3 heads."""
    return _entry("tinymim_vit_tiny", pretrained, kwargs)


@register_model
def tinymim_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Small/16, 6 heads."""
    return _entry("tinymim_vit_small", pretrained, kwargs)


@register_model
def tinymim_vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Base/16, 12 heads."""
    return _entry("tinymim_vit_base", pretrained, kwargs)


@register_model
def tinymim_vit_star_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TinyMIM*-T: 12 heads, distillation token, 1280-wide last layer."""
    return _entry("tinymim_vit_star_tiny", pretrained, kwargs)


def timm_form(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and arguments by which timm itself builds one of our backbones, without tinymim.

    Args:
        config: The backbone's constructor arguments, as our files hold them.

    Raises:
        ConfigError: timm's class lacks one of them.
    """
    given = {key: value for key, value in config.items() if value is not None}
    name = str(given.pop("name", ""))
    if timm.is_model(name) and name not in SIZES:
        return name, given
    if lacking := [key for key in OURS if given.get(key)]:
        raise ConfigError("timm cannot build it", f"its VisionTransformer has no {lacking[0]}", "use tinymim")
    sizes = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224"}  # others are changed to fit
    arguments = {key: given[key] for key in ARGUMENTS if key in given and key not in OURS}
    return sizes.get(given["embed_dim"], "vit_base_patch16_224"), arguments
