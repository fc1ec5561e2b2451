"""The shape of a hierarchical backbone follows from its student."""

from pathlib import Path

import torch
from mmengine.config import Config

from tinymim.literals import read_literal_file
from tinymim.models import read_checkpoint
from tinymim.models.backbone import from_config
from tinymim.seg.config import heads, say

OTHERS = {"type", "name", "img_size", "drop_path_rate", "out_indices", "norm_cfg", "pyramid_dim", "init_cfg", "with_cp"}
OTHERS |= {"frozen"}  # keys of a backbone that are no part of its shape


def take_shape(cfg: Config, student: str | Path | None, resumed: Path | None) -> None:
    """Give a backbone that the config names by timm's name the student's arguments, and the heads their widths.

    Arguments that the config sets itself stay: one that contradicts the student is refused when its weights are loaded.

    Args:
        cfg: The config, changed in place.
        student: File with the backbone's weights; None: as a resumed run began.
        resumed: Folder of the run that is resumed; None: a new run.
    """
    own = cfg.model.backbone
    if "name" not in own:
        return
    if student is not None:
        shape = read_checkpoint(student).config
    elif resumed is not None and (resumed / "config.py").is_file():
        shape = dict(read_literal_file(resumed / "config.py").get("model", {}).get("backbone", {}))
    else:
        return
    added = {key: value for key, value in shape.items() if key not in OTHERS and key not in own}
    if shape.get("name") != own.name:
        return
    own.update(added)
    if own.get("out_indices") is None:
        with torch.device("meta"):
            model = from_config({key: value for key, value in own.items() if key not in OTHERS - {"name"}})
        widths = [stage.width for stage in model.stage_info]
        for head in heads(cfg):
            at = head.get("in_index", -1)
            head.in_channels = [widths[i] for i in at] if isinstance(at, list | tuple) else widths[at]
    if added:
        say(f"backbone: {own.name} with {', '.join(f'{key}={value}' for key, value in added.items())}, as its student")
