"""``detector.pth``: tensors and a plain description, from which the detector is built again; nothing in it is run."""

import os
from typing import Any

from tinymim.det.detector import Detector
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import versions
from tinymim.models.checkpoints import save_torch
from tinymim.models.described import fill_described
from tinymim.models.stored import FIX, build_stored, check_meta
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weight_files import open_described

NAME, BACKBONE = "Detector", "network.backbone.backbone."


def save_detector(model: Detector, path: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``{"model": tensors, "meta": plain dict}``, atomically; loads with ``weights_only=True``.

    Args:
        model: The detector.
        path: File to write.
        meta: Added to name, arguments of backbone and detector, classes, mean, std and versions.
    """
    save_torch(
        {
            "model": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
            "meta": {
                "name": NAME,
                "backbone": model.backbone.config,
                "detector": model.config,
                "classes": model.classes,
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "versions": versions(),
            }
            | (meta or {}),
        },
        path,
    )


def load_detector(path: str | os.PathLike[str]) -> tuple[Detector, dict[str, Any]]:
    """Build the detector of a file.

    Returns:
        It, in evaluation mode, and the file's description.

    Raises:
        CheckpointError: no such file, damaged, no detector, or a description that its tensors do not fit.
    """
    state, meta = open_described(path)
    if meta.get("name") != NAME:
        raise CheckpointError(
            f"{path} holds no detector",
            "tinymim detect writes one as detector.pth",
            f"train one: tinymim detect --data PHOTOS --annotations FILE.json --student {path}",
        )
    check_meta(meta, state, str(path))
    classes, config = meta.get("classes"), meta.get("detector")
    if not isinstance(meta.get("backbone"), dict) or not isinstance(config, dict) or not isinstance(classes, list):
        raise CheckpointError(
            f"{path} does not describe its detector", "backbone, detector or classes are missing", FIX
        )
    inner = {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)}
    backbone = build_stored(meta["backbone"], inner, str(path))
    sides = [config.get("img_size"), config.get("channels"), *(config.get("anchor_sizes") or [0])]
    if not all(type(side) in (int, float) and 0 < side <= 1 << 13 for side in sides):
        raise CheckpointError(f"{path} describes no detector", f"sizes {sides}", FIX)
    try:
        model = Detector(backbone, [str(name) for name in classes], **config)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"no detector can be built from {path}", str(error).splitlines()[0], FIX) from None
    fill_described(model, state, path, "detector")
    return model.eval(), meta
