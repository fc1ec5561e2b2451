"""timm's models by name: a mistyped name or tag is an error of ours with the nearest names, before any download."""

import difflib
from pathlib import Path
from typing import Any

import timm

from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.hub import CONFIG, WEIGHTS
from tinymim.schema import read_json


def check_name(name: str, *, download: bool = False) -> None:
    """Whether timm has this model, tag included, and (with ``download``) weights for it. Works offline.

    Args:
        name: ``NAME`` or ``NAME.TAG``, with or without ``timm/``.
        download: Whether its weights are wanted.

    Raises:
        ConfigError: it has not; the nearest names are given.
    """
    name = name.removeprefix("timm/")
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=4)
        raise ConfigError(
            f"timm has no model {name[:100]!r}",
            f"similar names: {', '.join(near)}" if near else "no name is similar",
            f"did you mean timm/{near[0]}?" if near else "see: tinymim list teachers",
        )
    known = [other for other in timm.list_models(f"{model}.*", pretrained=True) if other.startswith(f"{model}.")]
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [other.partition(".")[2] for other in known]
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0.4)
        raise ConfigError(
            f"timm has no weights {name[:100]!r}",
            f"the model is there, but {tag[:60]!r} is none of its tags: {', '.join(tags) or '(it has none)'}",
            f"did you mean timm/{model}.{near[0]}?" if near else f"leave .{tag[:60]} out, or choose one of these",
        ) from None
    if download and not timm.models.is_model_pretrained(name):
        raise ConfigError(
            f"timm has no weights for {name}",
            "only the architecture is there" + (f"; weights exist as {', '.join(known[:4])}" if known else ""),
            f"use --teacher timm/{known[0]}" if known else "give a file of weights: --teacher-weights FILE",
        )


def timm_architecture(file: Path) -> str | None:
    """The architecture of timm that the config.json beside a ``model.safetensors`` names; None where it is ours.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: timm has no such model.
    """
    config = file.with_name(CONFIG)
    if file.name != WEIGHTS or not config.is_file():
        return None
    try:
        found = read_json(config, dict[str, Any])
    except DataError as error:
        raise CheckpointError(error.what, error.why, error.fix) from None
    name = found.get("architecture")
    if "tinymim" in found or not isinstance(name, str):
        return None
    check_name(name)
    return name
