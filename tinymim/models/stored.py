"""What our own files say of themselves, checked before anything is built from it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinymim.errors import CheckpointError, TinyMIMError
from tinymim.models.backbone import from_config

LARGEST, DEEPEST = 2**16, 1000  # of any number in a config, of all blocks together
STACKS = ("depth", "depths", "stages")  # numbers of blocks, each of which has tensors
FIX = "write the file again with the command that made it, or restore a copy"


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**53


def _three(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
    )


SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("a dictionary of arguments", lambda v: isinstance(v, dict) or _text(v)),  # a segmentor's is a text
    "backbone": ("a dictionary of arguments", lambda v: isinstance(v, dict)),
    "mean": ("three numbers", _three),
    "std": ("three numbers above 0", lambda v: _three(v) and min(v) > 0),
    "relations": ("a block and a number of heads, from 1", lambda v: _pair(v) and all(_whole(x, 1) for x in v)),
    "trained_depth": ("a block, from 1", lambda v: _whole(v, 1)),
    "step": ("a whole number", _whole),
    "steps": ("a whole number", _whole),
    "classes": ("a list of names", lambda v: isinstance(v, list | tuple) and all(isinstance(x, str) for x in v)),
}


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def check_meta(meta: Mapping[str, Any], state: Mapping[str, Tensor], path: str) -> None:
    """Types and bounds of the entries that are used.

    Raises:
        CheckpointError: an entry that cannot be true of these tensors.
    """
    for key, (expected, fits) in SHAPES.items():
        if meta.get(key) is not None and not fits(meta[key]):
            raise CheckpointError(f"{path}: meta[{key!r}] is {_short(meta[key])}", f"it must be {expected}", FIX)
    _check_arguments(backbone_config(meta), len(state), path)


def backbone_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's constructor arguments in the metadata of a student, classifier or segmentor; empty: unknown."""
    config = meta.get("backbone") or meta.get("config")
    return dict(config) if isinstance(config, dict) and "model" not in config else {}


ARGUMENTS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of a backbone; others are bounded, too
    "img_size": ("one or two whole numbers above 0", lambda v: _whole(v, 1) or (_pair(v) and _wholes(v))),
    "num_heads": ("a whole number above 0, or several", lambda v: _wholes(v if isinstance(v, list | tuple) else [v])),
    "mlp_ratio": ("a number above 0", lambda v: isinstance(v, int | float) and v > 0),
    "init_values": ("a number", lambda v: isinstance(v, int | float)),
    **dict.fromkeys(("name",), ("a name", lambda v: isinstance(v, str))),
    **dict.fromkeys(("rel_pos_bias", "dist_token"), ("yes or no", lambda v: isinstance(v, bool))),
    **dict.fromkeys(
        ("patch_size", "embed_dim", "depth", "last_dim"), ("a whole number above 0", lambda v: _whole(v, 1))
    ),
}
OPTIONAL = ("init_values", "last_dim")


def _wholes(values: Any) -> bool:
    return all(_whole(x, 1) for x in values)


def _check_arguments(config: Mapping[str, Any], tensors: int, path: str) -> None:
    for key, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
        plain = isinstance(key, str) and len(values) <= 100 and all(_plain(x) for x in values)
        expected, fits = ARGUMENTS.get(key, ("", bool)) if plain else ("", bool)
        why = ""
        if not plain or any(not 0 <= x <= LARGEST for x in numbers):  # NaN, too
            why = f"numbers go from 0 to {LARGEST}, others are texts, yes or no"
        elif expected and not fits(value) and not (value is None and key in OPTIONAL):
            why = f"it must be {expected}"
        elif key in STACKS and sum(numbers) > min(tensors, DEEPEST):
            why = f"the file has {tensors} tensors: too few for so many blocks ({DEEPEST} at most)"
        if why:
            raise CheckpointError(f"{path}: its config has {_short(key)}={_short(value)}", why, FIX)


def _plain(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) <= 4
    return value is None or isinstance(value, bool | int | float | str) or (pair and all(map(_plain, value)))


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def build_stored(config: Mapping[str, Any], state: Mapping[str, Tensor], path: str) -> Any:
    """The backbone of a file, with random weights; it takes no more memory than its tensors do.

    Raises:
        CheckpointError: the config describes no model, or a larger one than the file holds.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            planned = sum(value.numel() for value in from_config(config).state_dict().values())
        held = sum(value.numel() for value in state.values())
        if planned > 2 * held + 2**20:
            raise CheckpointError(
                f"{path} does not hold the model that it describes",
                f"that model has {planned:,} values, the file has {held:,}",
                FIX,
            )
        return from_config(config)
    except TinyMIMError:
        raise
    except Exception as error:  # what a constructor makes of arguments from a file
        raise CheckpointError(
            f"no model can be built from the config of {path}", f"{type(error).__name__}: {str(error)[:160]}", FIX
        ) from error
