"""The verbs a stage may run, and what a stage comes down to: every value that its numbers follow from."""

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinymim.engine.finetuning import finetune
from tinymim.engine.recipe import default_recipe, load_recipe
from tinymim.engine.run import run

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


@dataclass(frozen=True)
class Job:
    """What a verb with recipes runs.

    Attributes:
        method: The method its recipes are of.
        function: Its keywords are the verb's options.
        recipe: The recipe without ``--recipe``.
        files: Options that name a file although a recipe key has the same name.
    """

    method: str
    function: Callable[..., object]
    recipe: str
    files: tuple[str, ...] = ()


JOBS = {
    "pretrain": Job("mae", run, "mae_tiny"),
    "distill": Job("tinymim", run, "tinymim_tiny_from_mae_base"),
    "finetune": Job("finetune", finetune, "finetune_tiny", files=("student",)),
}
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
    overrides = dict(options.get("cfg_options", {}))
    if verb == "segment":
        places = (*CONFIG_PLACES, *({"data_root"} & {*options}))
        return json.loads(_config_values(str(options.get("config")), json.dumps(overrides), places))
    job = JOBS[verb]
    keys = _keys(job.method) - {*job.files}
    overrides = {key: value for key, value in options.items() if key in keys} | overrides
    return json.loads(_recipe_values(str(options.get("recipe", job.recipe)), job.method, json.dumps(overrides)))


@functools.cache
def _keys(method: str) -> frozenset[str]:
    """Every key that a recipe of a method may have."""
    return frozenset(default_recipe(method))


@functools.cache
def _recipe_values(name: str, method: str, overrides: str) -> str:
    """The values of a recipe as JSON."""
    given = json.loads(overrides)
    later = {key: value for key, value in given.items() if re.search(r'"\{[\w.]+\}"', json.dumps(value))}
    recipe = load_recipe(name, {key: value for key, value in given.items() if key not in later}, method)
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
