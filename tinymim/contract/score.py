"""The usual score of a candidate: a short training by a recipe, from the weights cut from its parent."""

import json
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.contract.factors import Config, kind_of
from tinymim.contract.search import Candidate
from tinymim.distill.method import find_method
from tinymim.engine.jobs import JOBS
from tinymim.engine.plan import measure
from tinymim.engine.recipe import load_recipe
from tinymim.errors import ConfigError
from tinymim.schema import read_lines

PLAIN = "tinymim_vit_tiny"  # the name under which recipes build any plain vision transformer


def student_of(config: Config) -> dict[str, Any]:
    """The recipe keys ``student`` and ``student_args`` (dotted, one for each argument) of a config."""
    name = PLAIN if kind_of(config) == "vit" else config["name"]
    arguments = {f"student_args.{key}": value for key, value in config.items() if key not in ("name", "img_size")}
    return {"student": name, **arguments}


@dataclass(frozen=True)
class RecipeScore:
    """Trains a candidate by a recipe of ``pretrain``, ``distill`` or ``finetune``; all candidates see the same batches.

    The score is the k-NN accuracy on ``probe_data`` at the end, if that is given; else a classifier's accuracy on
    ``val_data``; else minus the loss on ``val_data``; without, minus the mean training loss of the last quarter.

    Args:
        recipe: Name or file.
        settings: Of its job (:mod:`tinymim.engine.settings`): ``data``, ``max_steps``, ``teacher``, ...
    """

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        """The command that runs the recipe."""
        return find_method(load_recipe(self.recipe).method).verb

    @property
    def name(self) -> str:
        """What the score is, in words."""
        if self.settings.get("probe_data"):
            return "k-NN accuracy"
        if self.settings.get("val_data"):
            return "accuracy" if self.verb == "finetune" else "minus held-out loss"
        return "minus training loss"

    def check(self) -> None:
        """Refuse what no candidate could be scored with.

        Raises:
            ConfigError: a recipe of another command, or a setting that its job does not have.
        """
        verb = self.verb
        if verb not in JOBS:
            raise ConfigError(
                f"{self.recipe} is a recipe of tinymim {verb}",
                f"candidates are scored by {', '.join(JOBS)}",
                "choose another --recipe",
            )
        known = JOBS[verb].settings_type.__dataclass_fields__
        if wrong := [key for key in self.settings if key not in known]:
            option = "--" + wrong[0].replace("_", "-")
            raise ConfigError(
                f"{option} with {self.recipe}", f"tinymim {verb} has no such option", f"leave {option} out"
            )

    def job_settings(self, config: Config) -> dict[str, Any]:
        """The settings of the job that trains a model of a config, without its weights and folder."""
        given = dict(self.settings.get("cfg_options") or {})
        options = {**given, **student_of(config)}
        return {**self.settings, "img_size": max(config["img_size"]), "cfg_options": options}

    def __call__(self, candidate: Candidate) -> float:
        """Train, and keep the trained weights as the candidate's."""
        verb, run = self.verb, candidate.folder / "run"
        weights = {"student" if verb == "finetune" else "init_from": candidate.student}
        settings = {**self.job_settings(candidate.config), **weights, "out": run}
        if verb == "finetune" and candidate.step:  # its parent was trained on these classes: the head goes on, too
            settings["cfg_options"] = {"head": "by_class", **settings["cfg_options"]}
        job = JOBS[verb]
        settings["resume"] = (run / "config.py").is_file()  # a search that was stopped goes on within a candidate
        result: Any = job(self.recipe, job.settings_type(**settings)).run()
        score = self._read(run, result)
        os.replace(run / job.product, candidate.student)
        shutil.rmtree(run)
        return score

    def _read(self, run: Path, result: Any) -> float:
        lines = list(read_lines(run / "metrics.jsonl"))
        if self.settings.get("probe_data"):
            return float([line["knn_top1"] for line in lines if "knn_top1" in line][-1])
        if getattr(result, "top1", None) is not None:
            return float(result.top1)
        if result.val:
            return -float(result.val[-1][1])
        losses = [float(line["loss"]) for line in lines if "loss" in line]
        last = losses[-max(1, len(losses) // 4) :]
        return -math.fsum(last) / len(last)

    def minutes(self, config: Config) -> float:
        """Minutes of scoring a model of a config on this machine, from one measured step; nothing is written."""
        job = JOBS[self.verb]
        trained = job(self.recipe, job.settings_type(**self.job_settings(config), dry_run=True))
        trained.plan()
        with ExitStack() as held:
            trained.open(held)
            trained.build()
        cost = measure(trained.model, trained.config, trained.arithmetic, trained.place)
        return cost.seconds_per_image * cost.images / 60

    def described(self) -> dict[str, Any]:
        """What the scores depend on, as JSON values; folders are left out: they may move."""
        recipe = load_recipe(self.recipe).to_dict()
        kept = {key: value for key, value in self.settings.items() if key not in ("data", "val_data", "probe_data")}
        used = {key: bool(self.settings.get(key)) for key in ("val_data", "probe_data")}
        return dict(json.loads(json.dumps({"recipe": recipe, **kept, **used}, default=str)))
