"""Recipes: data-only files that are found by name, overridden by options and checked before any work starts."""

import copy
import math
from pathlib import Path
from typing import Any

from mmengine.config import Config

from tinymim.distill.method import find_method
from tinymim.distill.recipe_keys import Choice, Key, Kind, Number, Pair, Table, defaults, key_of, unknown_key
from tinymim.engine import classify  # noqa: F401  (registers the method "finetune")
from tinymim.engine.parallel import STRATEGIES
from tinymim.engine.python_file import load_python
from tinymim.errors import ConfigError, did_you_mean
from tinymim.literals import not_literal
from tinymim.models.backbone import backbone_arguments, backbone_names
from tinymim.models.registry import model_names

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
IMPORTS: dict[str, Key] = {
    "imports": Kind(types=(str, list), items=str, words="a list of modules", example="[MODULE]"),
    "allow_failed_imports": Choice(choices=(False, True)),
}
# Keys that every run has, whatever its method; their defaults are in recipes/_base.py and _finetune.py.
RUN_KEYS: dict[str, Key] = {
    "method": Key(),
    "custom_imports": Table(keys=IMPORTS),  # MMEngine's: dict(imports=["MODULE"]) imports methods from other packages
    "student": Key(),
    "student_args": Table(),
    "drop_path": Number(most=1, below=True),
    "img_size": Number(least=16, most=1 << 14, whole=True, option=True),
    "crop_scale": Pair(rule="0 < least <= most <= 1", example="[0.2,1.0]"),
    "color_jitter": Number(),
    "decode": Choice(choices=("crop", "whole")),
    "batch_size": Number(least=1, whole=True, option=True),
    "epochs": Number(above=True, option=True),
    "warmup_epochs": Number(),
    "base_lr": Number(above=True),
    "min_lr": Number(),
    "betas": Pair(rule="from 0 to below 1", example="[0.9,0.95]"),
    "weight_decay": Number(),
    "precision": Choice(choices=("auto", "fp32", "bf16", "fp16")),
    "grad_checkpointing": Choice(choices=(False, True)),
    "compile": Choice(choices=("auto", "on", "off")),
    "strategy": Choice(choices=STRATEGIES),
    "micro_batch": Number(least=1, whole=True, option=True, word="auto"),
    "save_every": Number(least=1, whole=True),
    "val_every": Number(least=1, whole=True),
    "watch_every": Number(whole=True),
    "probe_photos": Number(least=1, whole=True),
    "tensorboard": Choice(choices=(False, True)),
    "seed": Number(most=2**32 - 1, whole=True, option=True),
    "workers": Number(most=1024, whole=True, option=True),
}


def recipe_names(verb: str | None = None) -> list[str]:
    """Names of the recipes in the package, of one command or of all."""
    names = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    if verb is None:
        return names
    return [name for name in names if find_method(Config.fromfile(FOLDER / f"{name}.py").method).verb == verb]


def default_recipe(method: str | None) -> Config:
    """Every key of this method's recipes, with its default."""
    kind = find_method(method)
    recipe = Config.fromfile(FOLDER / kind.base)
    if clash := sorted(set(kind.keys) & {*RUN_KEYS, *recipe}):
        raise ConfigError(
            f"the method {kind.name!r} declares the recipe key {clash[0]!r}",
            "every run already has a key of this name",
            f"give the method's key another name; a recipe sets {clash[0]!r} itself",
        )
    for key, value in defaults(kind.keys).items():
        recipe[key] = copy.deepcopy(value)
    recipe.method = kind.name
    return recipe


def load_recipe(name: str, overrides: dict[str, Any] | None = None, verb: str | None = None) -> Config:
    """Read a shipped recipe by name, or any file of the same keys, and apply overrides.

    Args:
        name: e.g. ``tinymim_base_from_mae_large``, or a path ending in ``.py``.
        overrides: Dotted keys, e.g. ``{"student_args.depth": 4}``; None values are ignored.
        verb: The command that must run the recipe's method: "pretrain", "distill" or "finetune"; None: any.

    Returns:
        Every key of the method with its value.

    Raises:
        ConfigError: unknown recipe or key, an invalid value, or a recipe of another command.
    """
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.name.startswith("_"):
        raise ConfigError(
            f"unknown recipe {name!r}",
            f"the recipes are {', '.join(recipe_names(verb))}",
            did_you_mean(name, recipe_names(), "choose one of these, or a .py file of the same keys"),
        )
    recipe = load_python(path)
    changes, added = split_added({k: copy.deepcopy(v) for k, v in (overrides or {}).items() if v is not None})
    kind = find_method(changes.get("method", recipe.get("method")))
    if verb is not None and kind.verb != verb:
        raise ConfigError(
            f"{name} is a {kind.name} recipe",
            f"tinymim {kind.verb} runs such recipes",
            f"tinymim {kind.verb} --recipe {name}, or one of {', '.join(recipe_names(verb))}",
        )
    known = default_recipe(kind.name)
    for key, value in known.items():
        if key not in recipe:
            recipe[key] = value
        elif isinstance(value, dict) and isinstance(recipe[key], dict):
            recipe[key] = {**value, **recipe[key]}
    try:
        recipe.merge_from_dict(changes)
    except (KeyError, TypeError, IndexError, AssertionError) as error:
        raise ConfigError(f"cannot apply {changes}", str(error), "see --print-config for the keys") from error
    for key in recipe:
        if key not in known and key != "custom_imports" and key not in added:
            raise _unknown_key(key, known, kind)
    for key, value in not_literal(recipe.to_dict()):
        raise ConfigError(
            f"{key} is a {type(value).__name__}: {value!r:.80}",
            "a run keeps its recipe as data: numbers, texts, lists and dicts",
            "write the value itself, or the name of a registered method",
        )
    _check(recipe)
    return recipe


def _unknown_key(key: str, known: Config, kind: Any) -> ConfigError:
    """The error for a key that a recipe of this method does not have; it names recipes that do."""
    methods = {name: find_method(Config.fromfile(FOLDER / f"{name}.py").method) for name in recipe_names(kind.verb)}
    having = [name for name, method in methods.items() if key in method.keys]
    if not having:
        return unknown_key(key, known)
    return ConfigError(
        f"unknown key {key!r} in a {kind.name} recipe",
        f"recipes with this key are {', '.join(having)}",
        f"choose one of these with --recipe, or leave {key} out",
    )


def split_added(options: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Overrides without the ``+`` of ``+key``, which asks for a key that is not known; and the keys that had one."""
    return {key.removeprefix("+"): value for key, value in options.items()}, {
        key[1:] for key in options if key.startswith("+")
    }


def _check(recipe: Config) -> None:
    """Refuse invalid values, and keywords that the student does not have."""
    if recipe.student not in backbone_names():
        raise ConfigError(
            f"unknown student {recipe.student!r}",
            f"the models are {', '.join(model_names())}; and timm's hiera_*, tiny_vit_*, swin_*",
            did_you_mean(str(recipe.student), backbone_names()),
        )
    for key, rule in {**RUN_KEYS, **find_method(recipe.method).keys}.items():
        if key in recipe and (key != "custom_imports" or recipe[key] is not None):
            rule.check(key, recipe[key])
    keywords = backbone_arguments(recipe.student)
    for key, value in recipe.student_args.items():
        if keywords is not None and key in keywords:
            key_of(keywords[key]).check(f"student_args.{key}", value)
        elif keywords is not None:
            raise unknown_key(f"student_args.{key}", [f"student_args.{name}" for name in keywords], can_be_added=False)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to ``final``, per step (MAE and TinyMIM).

    Args:
        step: Step, from 0.
        steps: Steps in all.
        warmup: Warm-up steps.
        peak: Rate at the end of the warm-up.
        final: Rate at the end.
    """
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
