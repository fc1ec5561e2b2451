"""Frozen teachers: timm's vision transformers by name, or any checkpoint this project reads."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from tinymim.compat import is_first_process
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import input_name, sha256_file
from tinymim.hub import go_offline_if_unreachable, is_hub
from tinymim.models.backbone import TapByTap, qualified_name
from tinymim.models.checkpoints import check_values, model_from_checkpoint, read_checkpoint
from tinymim.models.formats import Checkpoint, describe, rename
from tinymim.models.timm_names import check_name, timm_architecture
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weight_files import weights_file
from tinymim.progress import say

TIMM = (
    VisionTransformer,
    Beit,
    Eva,
    VisionTransformerSAM,
)  # MAE, DeiT, DINOv2, CLIP, SigLIP; BEiT; EVA-02, DINOv3; SAM
TAPPABLE = (TapByTap, *TIMM)  # models that tinymim.distill.read can read
UNREAD = re.compile(r"(norm|fc_norm|head|head_dist|neck|attn_pool)\.")  # never read from a teacher


def default_target_block(depth: int) -> int:
    """The block (from 1) a teacher is read at by default: 18 of 24 (TinyMIM's table 10), else the last."""
    return 18 if depth == 24 else depth


@dataclass
class TeacherFacts:
    """Facts about a timm teacher that need no weights."""

    name: str
    width: int
    heads: int
    blocks: int
    patch: int
    target_block: int
    licence: str


def describe_teacher(name: str) -> TeacherFacts:
    """Facts about a timm model by name (no download).

    Raises:
        ConfigError: timm has no such model, or its class is not in :data:`TIMM`.
    """
    short = name.removeprefix("timm/")
    check_name(short)
    with torch.device("meta"):
        model: Any = timm.create_model(short.split(".")[0], num_classes=0)
    kind = type(model)
    if not issubclass(kind, TIMM) or not hasattr(model.blocks[0], "attn"):
        raise _unsupported(name, kind.__name__)
    depth = len(model.blocks)
    return TeacherFacts(
        f"timm/{short}",
        int(model.embed_dim),
        int(model.blocks[0].attn.num_heads),
        depth,
        int(model.patch_embed.patch_size[0]),
        default_target_block(depth),
        getattr(timm.get_pretrained_cfg(short), "license", None) or "not stated",
    )


@dataclass
class Teacher:
    """A frozen model and what a run must know about it.

    ``relations`` is (block, heads) for one of our students that was itself distilled by relations: the block they were
    learned at and the number of heads they were grouped into, which is that of the chain's first teacher.
    ``trained_depth`` is the deepest block whose every part was trained; of the block after it, relations train only
    q, k and v.
    """

    model: nn.Module
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str | None
    relations: tuple[int, int] | None = None
    trained_depth: int | None = None


TEACHERS: dict[str, Callable[..., Teacher]] = {}  # prefix of a name -> function that loads such teachers


def register_teacher(prefix: str) -> Callable[[Callable[..., Teacher]], Callable[..., Teacher]]:
    """Decorator: a function that loads the teachers whose names start with ``prefix``, e.g. "timm/".

    It is called like :func:`load_teacher`, with all of its keywords, and returns a :class:`Teacher` whose model is one
    of :data:`TAPPABLE`, frozen and in evaluation mode.

    Raises:
        ConfigError: another function loads names with this prefix.
    """

    def register(load: Callable[..., Teacher]) -> Callable[..., Teacher]:
        known = TEACHERS.get(prefix)
        if known is not None and qualified_name(known) != qualified_name(load):
            words = f"two functions load teachers called {prefix}NAME", f"{qualified_name(known)} has this prefix"
            raise ConfigError(*words, "register yours under another prefix")
        TEACHERS[prefix] = load
        return load

    return register


def teacher_prefix(name: str) -> str | None:
    """The longest registered prefix of a teacher's name; None if it is a file."""
    return max((prefix for prefix in TEACHERS if name.startswith(prefix)), key=len, default=None)


def load_teacher(
    name: str,
    *,
    img_size: int = 224,
    weights: str | os.PathLike[str] | None = None,
    num_heads: int | None = None,
    pretrained: bool = True,
    grid: int | None = None,
) -> Teacher:
    """Build a teacher, frozen and in evaluation mode.

    Args:
        name: ``timm/NAME``, e.g. ``timm/vit_large_patch16_224.mae``, a checkpoint file, or ``hf-hub:OWNER/NAME``.
        img_size: Side of its photos, pixels; positions are resized to it.
        weights: File to load into a timm model instead of downloading.
        num_heads: Heads per block, for checkpoint files that do not store it (``--teacher-heads``).
        pretrained: False keeps random weights (``--dry-run`` only).
        grid: Patches per side, whatever the patch size; replaces ``img_size``.

    Raises:
        ConfigError: unknown timm model, or one whose class is not in :data:`TIMM`.
        CheckpointError: the weights are missing, cannot be downloaded, or do not fit.
    """
    if not name:
        raise ConfigError("no teacher", "no name was given", "add --teacher timm/NAME or --teacher FILE")
    if prefix := teacher_prefix(name):
        return TEACHERS[prefix](
            name, img_size=img_size, weights=weights, num_heads=num_heads, pretrained=pretrained, grid=grid
        )
    if weights is not None:
        raise ConfigError(
            "--teacher-weights needs a timm teacher",
            f"{name} is a checkpoint file and has its own weights",
            "leave --teacher-weights out, or give --teacher timm/NAME",
        )
    if is_hub(name) or Path(name).is_dir():
        file = weights_file(name)
        if architecture := timm_architecture(file):
            name, sizes = f"timm/{architecture}", {"img_size": img_size, "grid": grid}
            found = _timm_teacher(name, weights=file, num_heads=num_heads, pretrained=pretrained, **sizes)
            return replace(found, name=input_name(file))
        name = str(file)
    if not Path(name).exists():
        files = "give the student.pth of a run, a checkpoint, or e.g. --teacher timm/vit_base_patch16_224.mae"
        raise CheckpointError(
            f"no teacher at {name}",
            "it is neither a file nor a timm/NAME",
            f"did you mean timm/{name}?" if timm.is_model(name.split(".")[0]) else files,
        )
    model, checkpoint = model_from_checkpoint(name, num_heads=num_heads, option="--teacher-heads")
    mean = tuple(checkpoint.meta.get("mean") or IMAGENET_MEAN)
    std = tuple(checkpoint.meta.get("std") or IMAGENET_STD)
    learned = checkpoint.meta.get("relations")
    return Teacher(
        model.eval().requires_grad_(False),
        input_name(name),
        mean,
        std,
        sha256_file(checkpoint.path),
        (int(learned[0]), int(learned[1])) if learned else None,
        checkpoint.meta.get("trained_depth"),
    )


@register_teacher("timm/")
def _timm_teacher(
    name: str,
    *,
    img_size: int,
    weights: str | os.PathLike[str] | None,
    num_heads: int | None,
    pretrained: bool,
    grid: int | None,
) -> Teacher:
    """Any of timm's vision transformers; timm defines its head count."""
    timm_name = name.removeprefix("timm/")
    check_name(timm_name, download=pretrained and weights is None)
    facts = describe_teacher(timm_name)
    img_size = (grid or -(-img_size // facts.patch)) * facts.patch
    try:
        model = _create_timm(name, weights, pretrained, num_classes=0, img_size=img_size)
    except TypeError as error:
        raise _unsupported(name, "model without img_size") from error
    sha = None
    if weights is not None:
        _load_resized(model, read_checkpoint(weights))
        sha = sha256_file(weights_file(weights))
    own: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    for note in own.get("notes") or () if is_first_process() else ():
        say(f"note: {name}: {note}")
    mean, std = tuple(own.get("mean") or IMAGENET_MEAN), tuple(own.get("std") or IMAGENET_STD)
    return Teacher(model.eval().requires_grad_(False), name, mean, std, sha)


def _load_resized(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a file into a timm model as timm would, resized to the model's size; parts after the blocks may be missing.

    Raises:
        CheckpointError: the file belongs to another model.
    """
    target = model.state_dict()
    state = rename(checkpoint.state, set(target))

    def other(why: str = "", fix: str = "name the architecture of these weights: --teacher timm/NAME") -> Exception:
        what = f"{checkpoint.path} does not fit timm's {type(model).__name__}"
        return CheckpointError(what, f"the file looks like {describe(checkpoint.state)}{why}", fix)

    biased = any(key.endswith("qkv.bias") and value.any() for key, value in state.items())
    if "storage_tokens" in state and biased and "blocks.0.attn.q_bias" not in target:  # timm would leave them out
        fix = "choose timm's model with such biases: its name has _qkvb (vit_small_patch16_dinov3_qkvb)"
        raise other("; it has biases of q, k and v, the model has none", fix)
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        state["mask_token"] = state["cls_token"]  # by which timm knows DINOv2's own names; it drops it
    try:
        state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
        if isinstance(model, VisionTransformerSAM):
            state = _resize_sam(state, target)
    except (RuntimeError, KeyError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise other() from error
    for key in state.keys() & target.keys():
        check_values(key, state[key], checkpoint.path)
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise other() from error
    if wrong := [key for key in (*found.missing_keys, *found.unexpected_keys) if not UNREAD.match(key)]:
        raise other(f"; {wrong[0]} is on one side only" + (f", as are {len(wrong) - 1} others" * (len(wrong) > 1)))


def _resize_sam(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAM's positions (1, H, W, D), bicubic, and its relative tables (2 S - 1, C), linear as SAM does it."""
    out = {}
    for key, value in state.items():
        wanted = target[key].shape if key in target else value.shape
        if value.shape != wanted and key == "pos_embed":
            maps = F.interpolate(value.permute(0, 3, 1, 2), size=wanted[1:3], mode="bicubic", align_corners=False)
            value = maps.permute(0, 2, 3, 1)
        elif value.shape != wanted and "rel_pos_" in key:
            value = F.interpolate(value.T[None], size=wanted[0], mode="linear")[0].T
        out[key] = value
    return out


def _create_timm(name: str, weights: str | os.PathLike[str] | None, pretrained: bool, **kwargs: Any) -> nn.Module:
    """``timm.create_model``; where weights are wanted and none are given, they are downloaded."""
    timm_name = name.removeprefix("timm/")
    download = pretrained and weights is None
    if download:
        go_offline_if_unreachable()
    try:
        if download and timm_name.startswith("samvit") and "img_size" in kwargs:  # timm resizes all but SAM
            native = timm.create_model(timm_name, pretrained=True, num_classes=0)
            model = timm.create_model(timm_name, **kwargs)
            model.load_state_dict(_resize_sam(native.state_dict(), model.state_dict()))
            return model
        return timm.create_model(timm_name, pretrained=download, **kwargs)
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        if not download or isinstance(error, TypeError):
            raise
        cfg = timm.get_pretrained_cfg(timm_name)
        where = getattr(cfg, "url", None) or f"https://huggingface.co/{getattr(cfg, 'hf_hub_id', timm_name)}"
        file = Path(where).name if where.endswith((".pth", ".pt", ".safetensors")) else "model.safetensors"
        raise CheckpointError(
            f"the weights of {name} cannot be downloaded",
            f"{type(error).__name__}: {str(error).splitlines()[0][:140]}",
            f"fetch {file} from {where} on a machine with internet, copy it here, and add --teacher-weights {file}",
        ) from error


def renormalise(mean: tuple[float, ...], std: tuple[float, ...], size: int) -> Callable[[Tensor], Tensor]:
    """A function that converts images from ImageNet's normalisation to another one, resized to (B, 3, size, size)."""

    def view(image: Tensor) -> Tensor:
        def row(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, device=image.device, dtype=image.dtype).view(1, 3, 1, 1)

        if image.shape[-1] != size:
            image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True)
        if (*mean, *std) == (*IMAGENET_MEAN, *IMAGENET_STD):
            return image
        return (image * row(IMAGENET_STD) + row(IMAGENET_MEAN) - row(mean)) / row(std)

    return view


def _unsupported(name: str, kind: str) -> ConfigError:
    return ConfigError(
        f"{name} is a {kind}",
        f"distillation can read timm's {', '.join(kind.__name__ for kind in TIMM)}",
        "choose e.g. timm/vit_base_patch16_224.mae or timm/beit_base_patch16_224",
    )


def state_sha256(model: nn.Module) -> str:
    """sha256 over a model's tensors, for teachers that were not loaded from a file."""
    import hashlib

    digest = hashlib.sha256()
    with torch.no_grad():
        for key, value in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
