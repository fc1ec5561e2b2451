"""The command that gives a student its segmentation head, as ``next:`` lines print it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIGS: dict[int | str | None, str] = {  # width of a plain backbone -> config
    192: "upernet_tinymim_t_light",
    384: "upernet_tinymim_s_light",
    768: "upernet_tinymim_b_light",
}
FAMILIES = {  # start of timm's names -> name that its config has, config, recipe that such a model can teach
    "hiera_": ("hiera_tiny_224", "upernet_hiera_tiny", "hiera_tiny_from_hiera_base"),
    "tiny_vit_5m": ("tiny_vit_5m_224", "upernet_tinyvit_5m", None),
    "tiny_vit_11m": ("tiny_vit_11m_224", "upernet_tinyvit_11m", None),
    "tiny_vit_21m": ("tiny_vit_21m_224", "upernet_tinyvit_21m", None),
    "swin_": ("swin_tiny_patch4_window7_224", "upernet_swin_tiny", "d2simmim_swin_tiny_from_swin_small"),
}
HEADS = {192: 3, 384: 6, 768: 12}  # of the configs


def segment_line(file: str | Path, shown: str | None = None) -> str:
    """``tinymim segment`` with the config of a student's size.

    Args:
        file: A student or classifier that a command of ours wrote.
        shown: The word that stands for the file; None: its path.
    """
    from tinymim.models.checkpoints import read_checkpoint

    found = read_checkpoint(file)
    config = found.config
    key, depth = config.get("name", config.get("embed_dim")), config.get("depth", 12)
    changes: dict[str, object] = {}
    if family := _family(config):
        known, name, _ = family
        changes = {} if key == known else {"backbone.name": key}
        changes |= {f"backbone.{key}": value for key, value in config.items() if key not in ("name", "img_size")}
        if changes:
            widths = [stage.width for stage in outline(config).stage_info]
            changes |= {"decode_head.in_channels": widths, "auxiliary_head.in_channels": widths[2]}
    elif config.get("dist_token"):
        name = "upernet_tinymim_star_t"
    elif (key in HEADS and depth == 12 and config.get("mlp_ratio", 4.0) == 4.0) or not isinstance(key, int):
        name = CONFIGS.get(key, CONFIGS[192])
        if found.meta.get("recipe") == "tinymim_tiny_small_data":
            name = "linear_tinymim_t_small_data"
        if key in HEADS and config.get("num_heads") != HEADS[key]:
            changes = {"backbone.num_heads": config.get("num_heads")}
    else:
        name = "linear_tinymim_t"
        shape = ("embed_dim", "depth", "num_heads", *(["mlp_ratio"] if config.get("mlp_ratio", 4.0) != 4.0 else []))
        changes = {f"backbone.{each}": config[each] for each in shape}
        changes |= {"backbone.out_indices": f"[{depth - 1}]"}
        changes |= {"decode_head.in_channels": key, "decode_head.channels": key}
    shown = shown or shlex.quote(str(file))
    line = f"tinymim segment {name} --data-root FOLDER --student {shown} --work-dir runs/seg"
    options = " ".join(f"model.{option}={_word(value)}" for option, value in changes.items())
    return line + (f" --cfg-options {options}" if options else "")


def _word(value: object) -> str:
    """A value of ``--cfg-options`` that needs no quotes."""
    return str([*value] if isinstance(value, list | tuple) else value).replace(" ", "")


def outline(config: Mapping[str, Any]) -> Any:
    """The backbone of a config without weights."""
    import torch

    from tinymim.models.backbone import from_config

    with torch.device("meta"):
        return from_config(config)


def _family(config: Mapping[str, Any]) -> tuple[str, str, str | None] | None:
    return next((row for start, row in FAMILIES.items() if str(config.get("name", "")).startswith(start)), None)


def after(verb: str, file: str | Path, data: str | Path) -> list[str]:
    """The commands that follow ``pretrain`` and ``distill``.

    Args:
        verb: One of these.
        file: The student that it wrote.
        data: The photos that it saw.
    """
    from tinymim.models.checkpoints import read_checkpoint

    family = _family(read_checkpoint(file).config)
    student = shlex.quote(str(file))
    if verb == "pretrain":
        recipe = family[2] if family else "tinymim_tiny_from_mae_base"
        taught = f"tinymim distill --recipe {recipe} --teacher {student} --data {shlex.quote(str(data))}"
        return ([taught] if recipe else []) + ([segment_line(file)] if family else [])
    lines = [segment_line(file), f"tinymim finetune --student {student} --data TRAIN --val-data VAL"]
    return [*lines, f"tinymim-export --onnx backbone.onnx --checkpoint {student} --part backbone"]
