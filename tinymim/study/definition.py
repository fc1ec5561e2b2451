"""Studies: a data-only file of stages and cells; cells x seeds are trials, and each trial writes a result file."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.engine import JOBS
from tinymim.engine.python_file import load_python
from tinymim.engine.recipe import FOLDER as RECIPES
from tinymim.errors import ConfigError
from tinymim.schema import read_json
from tinymim.study.records import CellResult
from tinymim.study.stages import Folder, Stage, make_stages, settings, stage_names, unknown
from tinymim.study.verbs import VERBS

FOLDER = RECIPES / "studies"
KEYS: dict[str, Any] = {
    "title": str,
    "paper": dict,
    "stages": dict,
    "cells": list,
    "grid": dict,
    "seeds": list,
    "score": str,
    "also": list,
}
PAPER_KEYS: dict[str, Any] = {"table": int, "metric": str, "note": str}
CELL_KEYS: dict[str, Any] = {"name": str, "group": str, "paper": int | float | dict, "set": dict}


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        name: Name in the table; :func:`slug` of it names files.
        group: Cells are ordered within their group (e.g. the student's size).
        paper: Score -> the paper's number, as printed there (percent).
        stages: Stage -> {"verb", options ...}: the study's, with the changes of the cell.
    """

    name: str
    group: str
    paper: dict[str, float]
    stages: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """A checked study file.

    Attributes:
        name: Name of the file.
        title: One line.
        paper: Source of the paper's numbers (:data:`PAPER_KEYS`).
        cells: Rows of the table.
        seeds: Each cell is run with each seed.
        scores: "stage.key"; the first is the main score.
    """

    name: str
    title: str
    paper: dict[str, Any]
    cells: list[Cell]
    seeds: list[int]
    scores: list[str]

    @property
    def wanted(self) -> list[str]:
        """The stages that the scores are read from."""
        return list(dict.fromkeys(score.partition(".")[0] for score in self.scores))


@dataclass(frozen=True)
class Trial:
    """A cell with a seed.

    Attributes:
        cell: The cell.
        seed: The seed.
        stages: Name -> stage, dependencies first.
        file: Its result file.
    """

    cell: Cell
    seed: int
    stages: dict[str, Stage]
    file: Path


def study_names() -> list[str]:
    """Names of the studies in the package."""
    return sorted(p.stem for p in FOLDER.glob("[!_]*.py"))


def slug(name: str) -> str:
    """A cell's name in file names and ``--only``: ``QK + VV, softmax`` -> ``qk-vv-softmax``."""
    return re.sub(r"[^a-z0-9.=_]+", "-", name.lower()).strip("-.")


def load_study(name: str) -> Study:
    """Read a shipped study by name, or a file of the same keys (names in capitals are constants of the file).

    Args:
        name: e.g. ``table07_relations``, or a path ending in ``.py``.

    Raises:
        ConfigError: unknown study, key, stage, verb, score or reference, cells of the same name, or seeds that have no
            effect.
    """
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.name.startswith("_"):
        raise unknown("study", name, [*study_names(), "FILE.py"])
    raw = load_python(path).to_dict()
    given = {key: value for key, value in raw.items() if not key.isupper()}
    _check_keys(str(path), given, KEYS, needed=("title", "stages", "score"))
    _check_keys("paper", given.get("paper", {}), PAPER_KEYS)
    _check_kinds("stages", given["stages"], dict)
    _check_kinds("grid", given.get("grid", {}), list | tuple)
    _check_kinds("seeds", dict(enumerate(given.get("seeds", []))), int)
    _check_kinds("cells", dict(enumerate(given.get("cells", []))), dict)
    scores = [given["score"], *given.get("also", [])]
    cells = [_cell(c, given["stages"], scores) for c in [*given.get("cells", []), *_product(given.get("grid", {}))]]
    slugs = [slug(cell.name) for cell in cells]
    if not cells or len(set(slugs)) < len(slugs) or "" in slugs:
        raise ConfigError(
            f"the cells of {path} are {slugs}",
            "there must be at least one cell, and their names must differ",
            "correct cells or grid",
        )
    study = Study(path.stem, given["title"], given.get("paper", {}), cells, list(given.get("seeds", [0])), scores)
    for cell in cells:
        if settings(cell.stages, study.wanted, 0) == settings(cell.stages, study.wanted, 1):
            raise ConfigError(
                f"{path}: every seed of {cell.name!r} would be the same run",
                "none of its stages has the seed among its options",
                'write seed="{seed}" into the stages that should depend on it',
            )
    return study


def choose_cells(study: Study, only: Iterable[str] | None) -> list[Cell]:
    """The cells of the given names, or all.

    Raises:
        ConfigError: no such cell.
    """
    by_slug = {slug(cell.name): cell for cell in study.cells}
    for name in only or ():
        if slug(name) not in by_slug:
            raise unknown("cell", name, by_slug)
    wanted = set(map(slug, only)) if only else set(by_slug)
    return [cell for key, cell in by_slug.items() if key in wanted]


def make_trials(
    study: Study, cells: Iterable[Cell], seeds: Iterable[int], data: Mapping[str, Folder], out: Path
) -> list[Trial]:
    """The trials to run, seed by seed, so that an interrupted study is complete for its first seeds.

    Raises:
        ConfigError: a stage needs data that was not given.
    """
    return [
        Trial(
            cell,
            seed,
            make_stages(cell.stages, study.wanted, seed, data, Path(out).resolve()),
            result_file(study, cell, seed, out),
        )
        for seed in seeds
        for cell in cells
    ]


def result_file(study: Study, cell: Cell, seed: int, out: Path) -> Path:
    """The result file of a cell and seed."""
    return Path(out) / study.name / "cells" / slug(cell.name) / f"seed{seed}.json"


def read_result(
    study: Study, cell: Cell, seed: int, out: Path, data: Mapping[str, Folder] | None = None
) -> dict[str, Any] | None:
    """A cell's result; None if there is none, or if its stages differ from the study's current ones.

    Args:
        study: The study.
        cell: One of its cells.
        seed: Seed of the result.
        out: Folder of all studies.
        data: The data it must have been made with; None: any.
    """
    path = result_file(study, cell, seed, out)
    if not path.is_file():
        return None
    value = read_json(path, CellResult, fix="restore it, or delete it: the study makes it again from its stages")
    contents = {word: item["list_sha256"] for word, item in value["data"].items()}
    same_data = all(data[word].content["list_sha256"] == own for word, own in contents.items() if data and word in data)
    names = stage_names(settings(cell.stages, study.wanted, seed), contents)
    return value if same_data and value["stages"] == names else None


def _check_keys(where: str, given: Mapping[str, Any], known: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    for key, value in given.items():
        if key not in known:
            raise unknown(f"key in {where}:", key, known)
        if value is not None:
            _check_kinds(where, {key: value}, known[key])
    for key in needed:
        if not given.get(key):
            raise ConfigError(f"{where} has no {key!r}", f"its keys are {', '.join(known)}", f"add {key}")


def _check_kinds(where: str, given: Mapping[Any, Any], kind: Any) -> None:
    for key, value in given.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            words = {str: "a text", dict: "a dict", int: "a whole number", list: "a list", list | tuple: "a list"}
            wanted = words.get(kind, "a number, or a dict of them")
            raise ConfigError(f"{where}: {key} is {value!r}", f"it must be {wanted}", "correct the file")


def _product(grid: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """One cell for every combination of the values."""
    for values in itertools.product(*grid.values()) if grid else ():
        changes = dict(zip(grid, values, strict=True))
        yield {"name": ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items()), "set": changes}


def _cell(given: dict[str, Any], stages: dict[str, Any], scores: list[str]) -> Cell:
    """A cell of the file: the study's stages with the cell's changes."""
    _check_keys("a cell", given, CELL_KEYS, needed=("name",))
    changed = json.loads(json.dumps(stages))  # a copy, tuples as lists
    for key, value in given.get("set", {}).items():
        stage, _, option = key.partition(".")
        if stage not in changed:
            raise unknown("stage", stage, changed)
        place, _, inner = option.partition(".")
        if not place or (inner and place != "cfg_options"):
            raise unknown("option", key, [f"{stage}.OPTION", f"{stage}.cfg_options.KEY"])
        target, name = (changed[stage].setdefault("cfg_options", {}), inner) if inner else (changed[stage], option)
        target[name] = json.loads(json.dumps(value))
    paper = given.get("paper") or {}
    paper = paper if isinstance(paper, dict) else {scores[0]: paper}
    _check_kinds(f"paper of {given['name']}", paper, int | float)
    for name, stage in changed.items():
        if stage.get("verb") not in VERBS:
            raise unknown(f"verb of stage {name!r}:", str(stage.get("verb")), VERBS)
    for score in scores:
        name, _, key = score.partition(".")
        if name not in changed:
            raise unknown("stage", name, changed)
        verb = changed[name]["verb"]
        known = JOBS[verb].scores if verb in JOBS else ()
        if known and key not in known:
            raise unknown(f"score of {name!r}:", key, known)
    for score in paper:
        if score not in scores:
            raise unknown("score", score, scores)
    return Cell(given["name"], given.get("group", ""), paper, changed)
