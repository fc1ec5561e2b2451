"""The verbs a stage may run, and what a stage comes down to: every value that its numbers follow from."""

import contextlib
import functools
import io
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tinymim.engine import JOBS
from tinymim.engine.recipe import load_recipe

ADDED: dict[str, Any] = {}  # key that recipes have got since stages are hashed by value -> value that changes nothing
PLACES = ("workers", "device")  # options and keys that leave the numbers alone
CONFIG_PLACES = ("num_workers", "persistent_workers")  # the same, at any depth of an MMSegmentation config
UNUSED = (  # top-level keys that training and its validation do not read
    "custom_imports",
    "log_level",
    "test_cfg",
    "test_dataloader",
    "test_evaluator",
    "test_pipeline",
    "tta_model",
    "tta_pipeline",
)


VERBS = (*JOBS, "segment")  # the last one has configs of MMSegmentation in place of recipes


def resolve(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a stage's recipe or MMSegmentation config, inherited and overridden ones too.

    A changed default changes what is resolved; comments, formatting, the file's name and where a value is written do
    not. Keys of a recipe that are None are left out, and so is a key of :data:`ADDED` with the value noted there: a key
    that recipes get later changes nothing where its default is None, or is noted because it keeps what was done before.
    :data:`PLACES`, :data:`CONFIG_PLACES` and :data:`UNUSED` are left out, and a config's ``data_root`` where the option
    of that name takes its place.

    Args:
        verb: One of :data:`VERBS`.
        options: The stage's, with ``cfg_options`` as dotted keys; "{references}" stay what they are.

    Raises:
        ConfigError: what the verb itself would say of the recipe or config and its overrides.
    """
    if verb == "segment":
        overrides = dict(options.get("cfg_options", {}))
        places = (*CONFIG_PLACES, *({"data_root"} & {*options}))
        return json.loads(_config_values(str(options.get("config")), json.dumps(overrides), places))
    recipe, given = str(options.get("recipe", JOBS[verb].recipe_name)), recipe_overrides(verb, options)
    return json.loads(_recipe_values(recipe, verb, json.dumps(given)))


def is_recipe_key(verb: str, option: str) -> bool:
    """Whether an option of a verb sets the recipe key of its name; fine-tuning's ``student`` names a file."""
    return verb not in JOBS or recipe_overrides(verb, {option: "?"}).get(option) == "?"


def recipe_overrides(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe key -> value, for the options of a stage that stand for one, ``cfg_options`` last."""
    kind = JOBS[verb].settings_type
    names = {each.name for each in fields(kind)} - {"data"}
    asked = kind(data="", **{key: value for key, value in options.items() if key in names})
    return {key: value for key, value in asked.overrides().items() if value is not None}


@functools.cache
def _recipe_values(name: str, verb: str, overrides: str) -> str:
    """The values of a recipe as JSON."""
    given = json.loads(overrides)
    later = {key: value for key, value in given.items() if re.search(r'"\{[\w.]+\}"', json.dumps(value))}
    recipe = load_recipe(name, {key: value for key, value in given.items() if key not in later}, verb)
    recipe.merge_from_dict(later)  # references: no value to be checked yet
    values = json.loads(json.dumps(recipe.to_dict()))
    return json.dumps(
        {
            key: value
            for key, value in values.items()
            if not (value is None or key in PLACES or (key in ADDED and ADDED[key] == value))
        }
    )


@functools.cache
def _config_values(name: str, overrides: str, places: tuple[str, ...]) -> str:
    """The values of an MMSegmentation config as JSON."""
    from tinymim.seg.config import find_config, merge_options

    config = find_config(name)
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will say what it changes
        merge_options(config, json.loads(overrides))

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_places(item) for key, item in value.items() if key not in places}
        return [without_places(item) for item in value] if isinstance(value, list | tuple) else value

    values = {key: value for key, value in config.to_dict().items() if key not in UNUSED}
    return json.dumps(without_places(values), default=str)
