"""Recipes: data-only files, found by name, overridden by options, checked before any work starts."""

import copy
import difflib
import math
from pathlib import Path
from typing import Any

from mmengine.config import Config

from tinymim.errors import ConfigError
from tinymim.models.registry import model_names

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("tinymim", "mae", "finetune"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "distillation": ("hard", "soft"),
    "class_token": (None, True, False),
    "softmax": (True, False),
}
NUMBERS: dict[str, tuple[Any, float, float]] = {  # key -> kind, least, most
    "batch_size": (int, 1, math.inf),
    "img_size": (int, 16, math.inf),
    "workers": (int, 0, math.inf),
    "seed": (int, 0, math.inf),
    "epochs": (int | float, 0, math.inf),
    "base_lr": (int | float, 0, math.inf),
    "weight_decay": (int | float, 0, math.inf),
    "drop_path": (int | float, 0, 1),
    "reconstruct": (int | float, 0, math.inf),
    "teacher_drop_path": (int | float, 0, 1),
    "layer_decay": (int | float, 0, 1),
    "mixup": (int | float, 0, math.inf),
    "cutmix": (int | float, 0, math.inf),
    "smoothing": (int | float, 0, 1),
    "reprob": (int | float, 0, 1),
    "alpha": (int | float, 0, 1),
    "tau": (int | float, 0, math.inf),
    "ema": (int | float, 0, 1),
    "warmup_epochs": (int | float, 0, math.inf),
    "min_lr": (int | float, 0, math.inf),
    "mask_ratio": (int | float, 0, 1),
    "mixup_prob": (int | float, 0, 1),
    "switch_prob": (int | float, 0, 1),
    "color_jitter": (int | float, 0, math.inf),
    "micro_batch": (int, 1, math.inf),
    "save_every": (int, 1, math.inf),
    "val_every": (int, 1, math.inf),
    "watch_every": (int, 0, math.inf),
    "probe_photos": (int, 1, math.inf),
    "target_block": (int, 1, math.inf),
    "relation_heads": (int, 1, math.inf),
}
PAIRS = {"crop_scale": "0 < least <= most <= 1", "betas": "from 0 to below 1"}
ABOVE = ("epochs", "layer_decay", "tau", "base_lr", "mask_ratio")  # not 0
BELOW = ("drop_path", "teacher_drop_path", "smoothing", "ema", "mask_ratio")  # not 1
OPTIONS = ("batch_size", "img_size", "workers", "seed", "epochs")  # that have an option of their own
VERBS = {"mae": "pretrain", "tinymim": "distill", "finetune": "finetune"}  # method -> the command that runs it


def recipe_names(method: str | None = None) -> list[str]:
    """Recipes that ship with the package, of one method or all."""
    first = {"mae": "mae_", "tinymim": "tinymim_", "finetune": "finetune_", None: ""}[method]
    return sorted(p.stem for p in FOLDER.glob("[!_]*.py") if p.stem.startswith(first))


def default_recipe(method: str | None) -> Config:
    """Every key a recipe of this method may have, with its default."""
    return Config.fromfile(FOLDER / ("_finetune.py" if method == "finetune" else "_base.py"))


def load_recipe(name: str, overrides: dict[str, Any] | None = None, method: str | None = None) -> Config:
    """Read a shipped recipe by name, or any file of the same keys, and apply overrides.

    Args:
        name: e.g. ``tinymim_base_from_mae_large``, or a path ending in ``.py``.
        overrides: Dotted keys, e.g. ``{"student_args.depth": 4}``; None values are ignored.
        method: The method the recipe must be of; None: any.

    Raises:
        ConfigError: unknown recipe or key, a value of the wrong kind, or a recipe of another command.
    """
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.name.startswith("_"):
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        raise ConfigError(
            f"unknown recipe {name!r}",
            f"the recipes are {', '.join(recipe_names(method))}",
            f"did you mean {near[0]!r}?" if near else "choose one of these, or a .py file of the same keys",
        )
    try:
        recipe = Config.fromfile(path)
        known = default_recipe(recipe.get("method"))
        changes = {k: copy.deepcopy(v) for k, v in (overrides or {}).items() if v is not None}
        if changes:
            recipe.merge_from_dict(changes)
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"cannot apply {overrides}", str(error), "see --print-config for the keys") from error
    for key in recipe:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            raise ConfigError(
                f"unknown key {key!r} in the recipe",
                f"a recipe has {', '.join(known)}",
                f"did you mean {near[0]!r}?" if near else "remove it; --print-config shows what there is",
            )
    _check(recipe)
    if method is not None and recipe.method != method:
        raise ConfigError(
            f"{name} is a {recipe.method} recipe",
            f"tinymim {VERBS[recipe.method]} runs such recipes",
            f"tinymim {VERBS[recipe.method]} --recipe {name}, or one of {', '.join(recipe_names(method))}",
        )
    return recipe


def _check(recipe: Config) -> None:
    for key, allowed in CHOICES.items():
        if key in recipe and recipe[key] not in allowed:
            raise ConfigError(
                f"{key}={recipe[key]!r}",
                f"it must be one of {', '.join(map(str, allowed))}",
                f"--cfg-options {key}={allowed[-1]}",
            )
    if recipe.student not in model_names():
        near = difflib.get_close_matches(str(recipe.student), model_names(), n=1)
        raise ConfigError(
            f"unknown student {recipe.student!r}",
            f"the models are {', '.join(model_names())}",
            f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
    for key, (kind, least, most) in NUMBERS.items():
        value = recipe.get(key)
        if value is None or (key == "ema" and not value):
            continue
        number = not isinstance(value, bool) and isinstance(value, kind)
        if not number or not least <= value <= most or (key in ABOVE and value == 0) or (key in BELOW and value == 1):
            span = f"of at least {least}" if math.isinf(most) else f"from {least} to {most}"
            span += " (not 0)" * (key in ABOVE) + " (not 1)" * (key in BELOW)
            option = f"--{key.replace('_', '-')} N" if key in OPTIONS else f"--cfg-options {key}=N"
            raise ConfigError(f"{key}={value!r}", f"it must be a number {span}", f"use {option}")

    for key, rule in PAIRS.items():
        pair = recipe.get(key)
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) in (int, float) for n in pair)
        if numbers and (0 < pair[0] <= pair[1] <= 1 if key == "crop_scale" else all(0 <= n < 1 for n in pair)):
            continue
        example = "[0.2,1.0]" if key == "crop_scale" else "[0.9,0.95]"
        raise ConfigError(f"{key}={pair!r}", f"two numbers are needed, {rule}", f"--cfg-options {key}={example}")


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to ``final``, per step (MAE and TinyMIM).

    Args:
        step: 0-based step.
        steps: Steps in all.
        warmup: Warm-up steps.
        peak: Rate at the end of the warm-up.
        final: Rate at the end.
    """
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
