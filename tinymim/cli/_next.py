"""The command that gives a student its segmentation head, as ``next:`` lines print it."""

import shlex
from pathlib import Path

CONFIGS: dict[int | str | None, str] = {  # width, or timm's name, of a backbone -> config
    192: "upernet_tinymim_t_light",
    384: "upernet_tinymim_s_light",
    768: "upernet_tinymim_b_light",
    "hiera_tiny_224": "upernet_hiera_tiny",
    "tiny_vit_5m_224": "upernet_tinyvit_5m",
}
HEADS = {192: 3, 384: 6, 768: 12}  # of the configs


def segment_line(file: str | Path, work_dir: str = "runs/seg") -> str:
    """``tinymim segment`` with the config of a student's size.

    Args:
        file: A student or classifier that a command of ours wrote.
        work_dir: Folder of the training.
    """
    from tinymim.models.checkpoints import read_checkpoint

    found = read_checkpoint(file)
    config = found.config
    key, depth = config.get("name", config.get("embed_dim")), config.get("depth", 12)
    changes: dict[str, object] = {}
    if config.get("dist_token"):
        name = "upernet_tinymim_star_t"
    elif (key in HEADS and depth == 12) or not isinstance(key, int):
        name = CONFIGS.get(key, CONFIGS[192])
        if found.meta.get("recipe") == "tinymim_tiny_small_data":
            name = "linear_tinymim_t_small_data"
        if key in HEADS and config.get("num_heads") != HEADS[key]:
            changes = {"backbone.num_heads": config.get("num_heads")}
    else:
        name = "linear_tinymim_t"
        changes = {f"backbone.{each}": config[each] for each in ("embed_dim", "depth", "num_heads")}
        changes |= {"backbone.out_indices": f"[{depth - 1}]"}
        changes |= {"decode_head.in_channels": key, "decode_head.channels": key}
    line = f"tinymim segment {name} --data-root FOLDER --student {shlex.quote(str(file))} --work-dir {work_dir}"
    options = " ".join(f"model.{option}={value}" for option, value in changes.items())
    return line + (f" --cfg-options {options}" if options else "")
