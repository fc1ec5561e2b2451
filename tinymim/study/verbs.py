"""The verbs that a stage may run, and the resolved values of a stage: everything that decides its result."""

import contextlib
import functools
import inspect
import io
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tinymim.engine import JOBS
from tinymim.engine.recipe import load_recipe, split_added
from tinymim.errors import ConfigError, did_you_mean

OURS = {"title", "out", "work_dir", "resume", "overwrite", "dry_run"}  # keywords that a stage cannot set
# recipe key newer than the hash of values -> the value of old results
ADDED: dict[str, Any] = {"decode": "whole", "compile": "auto", "teacher_precision": "auto"}
PLACES = ("workers", "device")  # options and keys that do not change results
CONFIG_PLACES = ("num_workers", "persistent_workers")  # the same, at any depth of an MMSegmentation config
UNUSED = (  # top-level keys that training and validation do not read
    "custom_imports",
    "log_level",
    "test_cfg",
    "test_dataloader",
    "test_evaluator",
    "test_pipeline",
    "tta_model",
    "tta_pipeline",
)


VERBS = (*JOBS, "segment")  # the last has MMSegmentation configs instead of recipes


def resolve(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a stage's recipe or MMSegmentation config, including inherited and overridden ones.

    A changed default changes the result; comments, formatting, the file's name and where a value is written do not.
    Recipe keys that are None are left out, and so are keys of :data:`ADDED` with the value given there: a key that is
    added to recipes later changes no hash if its default is None or is listed there. :data:`PLACES`,
    :data:`CONFIG_PLACES` and :data:`UNUSED` are left out, and a config's ``data_root`` if the option of that name
    replaces it.

    Args:
        verb: One of :data:`VERBS`.
        options: The stage's options, with ``cfg_options`` as dotted keys; "{references}" are kept.

    Raises:
        ConfigError: an invalid recipe, config or override.
    """
    if verb == "segment":
        overrides = dict(options.get("cfg_options", {}))
        places = (*CONFIG_PLACES, *({"data_root"} & {*options}))
        values = json.loads(_config_values(str(options.get("config")), json.dumps(overrides), places))
        if "teacher" in values or "teacher_segmentor" in options:
            from tinymim.seg.distillation import teacher_settings

            values["teacher"] = teacher_settings(values.get("teacher") or {})
        return values
    recipe, given = str(options.get("recipe", JOBS[verb].settings_type.default_recipe)), recipe_overrides(verb, options)
    return json.loads(_recipe_values(recipe, verb, json.dumps(given)))


def check_stage(verb: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the command line of a stage cannot hold; its recipe or config has checked ``cfg_options``.

    Raises:
        ConfigError: an unknown option, a value of the wrong type, or a dict in a list.
    """
    arguments: dict[str, dict[str, Any]] = {}
    if verb in JOBS:
        arguments = {each.name: each.metadata.get("argument", {}) for each in fields(JOBS[verb].settings_type)}
        known = {"recipe", *arguments} - OURS
    else:
        from tinymim.seg import train_segmentor

        known = {*inspect.signature(train_segmentor).parameters} - OURS
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"unknown option of {verb}: {name!r}",
                f"the choices are {', '.join(sorted(known))}",
                did_you_mean(name, known),
            )
        convert = arguments.get(name, {}).get("type", str)
        try:
            convert(value)
        except (TypeError, ValueError):
            kind = "a whole number" if convert is int else "a number"
            raise ConfigError(
                f"{name}={value!r} of a {verb} stage", f"it must be {kind}", "correct the study"
            ) from None
    for key, value in dict(options.get("cfg_options") or {}).items():
        if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            raise ConfigError(
                f"cfg_options {key}={value!r} of a {verb} stage",
                "an option cannot hold a dict in a list",
                "write it into a recipe or config file of your own, and name that file in the stage",
            )


def is_reference(value: Any) -> bool:
    """Whether a value holds a "{reference}", which is filled in later."""
    return re.search(r'"\{[\w.]+\}"', json.dumps(value)) is not None


def is_recipe_key(verb: str, option: str) -> bool:
    """Whether an option of a verb sets the recipe key of its name; fine-tuning's ``student`` names a file."""
    return verb not in JOBS or recipe_overrides(verb, {option: "?"}).get(option) == "?"


def recipe_overrides(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe key -> value, for the options of a stage that set one; ``cfg_options`` come last and win."""
    kind = JOBS[verb].settings_type
    names = {each.name for each in fields(kind)} - {"data"}
    given = kind(data="", **{key: value for key, value in options.items() if key in names})
    return {key: value for key, value in given.overrides().items() if value is not None}


@functools.cache
def _recipe_values(name: str, verb: str, overrides: str) -> str:
    """The values of a recipe as JSON."""
    given = json.loads(overrides)
    later = {key: value for key, value in given.items() if is_reference(value)}
    recipe = load_recipe(name, {key: value for key, value in given.items() if key not in later}, verb)
    recipe.merge_from_dict(split_added(later)[0])  # references: their values cannot be checked yet
    values = without_added(json.loads(json.dumps(recipe.to_dict())))
    return json.dumps({key: value for key, value in values.items() if not (value is None or key in PLACES)})


def without_added(value: Any) -> Any:
    """A dict of recipe keys without those of :data:`ADDED` that have the value given there; others unchanged."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key not in ADDED or ADDED[key] != item}


@functools.cache
def _config_values(name: str, overrides: str, places: tuple[str, ...]) -> str:
    """The values of an MMSegmentation config as JSON."""
    from tinymim.seg.config import find_config, merge_options
    from tinymim.seg.known import check_options

    config, given = find_config(name), json.loads(overrides)
    later, added = split_added({key: value for key, value in given.items() if is_reference(value)})
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself prints what it changes
        merge_options(config, {key: value for key, value in given.items() if not is_reference(value)})
    check_options(config, later, added)
    config.merge_from_dict(later)

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_places(item) for key, item in value.items() if key not in places}
        return [without_places(item) for item in value] if isinstance(value, list | tuple) else value

    values = {key: value for key, value in config.to_dict().items() if key not in UNUSED}
    return json.dumps(without_places(values), default=str)
