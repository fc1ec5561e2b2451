"""``tracker.pth``: tensors and a plain description, from which the tracker is built again; nothing in it is run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import versions
from tinymim.models.checkpoints import save_torch
from tinymim.models.described import fill_described
from tinymim.models.stored import FIX, build_stored, check_meta
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.models.weight_files import open_described
from tinymim.track.network import Tracker, hann_window, read_box

NAME = "Tracker"
SIDES = 1 << 13  # pixels, channels


def save_tracker(model: Tracker, path: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Write ``{"model": tensors, "meta": plain dict}``, atomically; loads with ``weights_only=True``.

    Args:
        model: The tracker.
        path: File to write.
        meta: Added to name, constructor arguments of backbone and tracker, mean, std and versions.
    """
    save_torch(
        {
            "model": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
            "meta": {
                "name": NAME,
                "backbone": model.backbone.config,
                "tracker": model.config,
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "versions": versions(),
            }
            | (meta or {}),
        },
        path,
    )


def read_tracker_meta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and description of a ``tracker.pth``; None: the file is something else.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    state, meta = open_described(path)
    return (state, meta) if meta.get("name") == NAME else None


def load_tracker(path: str | os.PathLike[str]) -> tuple[Tracker, dict[str, Any]]:
    """Build the tracker of a file.

    Returns:
        It, in evaluation mode, and the file's description.

    Raises:
        CheckpointError: no such file, damaged, no tracker, or a description that its tensors do not fit.
    """
    found = read_tracker_meta(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no tracker",
            "tinymim track writes one as tracker.pth",
            f"train one: tinymim track --data FOLDER --student {path}",
        )
    state, meta = found
    _check_config(meta.get("tracker"), str(path))
    check_meta(meta, state, str(path))
    if not isinstance(meta.get("backbone"), dict):
        raise CheckpointError(f"{path} does not describe its backbone", "meta['backbone'] is missing", FIX)
    inner = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    backbone = build_stored(meta["backbone"], inner, str(path))
    try:
        model = Tracker(backbone, **meta["tracker"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"no tracker can be built from {path}", str(error).splitlines()[0], FIX) from None
    fill_described(model, state, path, "tracker")
    return model.eval(), meta


def _check_config(config: Any, path: str) -> None:
    whole, real = ("template_size", "search_size", "channels"), ("template_factor", "search_factor", "keep")
    blocks = config.get("eliminate_in") if isinstance(config, dict) else None
    fits = (
        isinstance(config, dict)
        and config.keys() == {*whole, *real, "eliminate_in"}
        and all(type(config[key]) is int and 0 < config[key] <= SIDES for key in whole)
        and all(type(config[key]) in (int, float) and 0 < config[key] <= 100 for key in real)
        and isinstance(blocks, list | tuple)
        and all(type(block) is int for block in blocks)
    )
    if not fits:
        raise CheckpointError(f"{path} does not describe its tracker", "meta['tracker'] is damaged", FIX)


class TrackerGraph(nn.Module):
    """A tracker as it is used, with Hann's window: what a file computes.

    Template (B, 3, Z, Z) and search crop (B, 3, S, S), normalised -> ``box`` (B, 4): centre x, y, width, height as
    fractions of the search crop; ``confidence`` (B,); and the maps ``score``, ``offset``, ``size``.
    """

    window: Tensor

    def __init__(self, model: Tracker) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("window", hann_window(model.grids[1]), persistent=False)

    def forward(self, template: Tensor, search: Tensor) -> dict[str, Tensor]:
        maps = self.model(template, search)
        box, confidence = read_box(maps, self.window)
        return {"box": box, "confidence": confidence, **maps}


class TorchNetwork:
    """A ``tracker.pth`` in PyTorch, for :class:`~tinymim.track.following.OneStream`.

    Attributes:
        name: File and runtime.
        sizes: Sides of template and search crop, pixels.
        factors: Of their squares.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        model, meta = load_tracker(path)
        self.name, self.graph = f"{Path(path).name} (PyTorch)", TrackerGraph(model).eval()
        config = model.config
        self.sizes: tuple[int, int] = (config["template_size"], config["search_size"])
        self.factors: tuple[float, float] = (config["template_factor"], config["search_factor"])
        self.mean, self.std = (torch.tensor(meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def locate(self, template: np.ndarray, search: np.ndarray) -> tuple[np.ndarray, float]:
        """Crops uint8 (Z, Z, 3) and (S, S, 3) -> centre x, y, width, height as fractions (4,), and confidence."""
        views = [torch.tensor(crop).permute(2, 0, 1)[None].float() / 255 for crop in (template, search)]
        out = self.graph(*((view - self.mean) / self.std for view in views))
        return out["box"][0].double().numpy(), float(out["confidence"][0])
