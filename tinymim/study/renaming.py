"""Rename results and stage folders from before 2026-12 to their current names; their contents stay unchanged.

The former rule hashed a stage's options, the lines of its recipe's own file and the sha256 of its MMSegmentation config
without overrides: a renamed recipe was another stage, a changed default that recipes inherit was not. A result is
renamed only if it is consistent (its settings give the names that it holds) and if its settings resolve to the study's
current values. Only the names change, byte for byte; ``renamed.json`` next to the results holds the proof, and a second
call finds nothing to do.
"""

import ast
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.engine.python_file import load_python
from tinymim.engine.recipe import FOLDER as RECIPES
from tinymim.engine.recipe import load_recipe
from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import atomic_path, config_file, write_json
from tinymim.schema import read_json
from tinymim.study.definition import Cell, Study, result_file
from tinymim.study.records import CellResult, Renamings
from tinymim.study.stages import Folder, data_words, flat_options, hashed_names, settings, stage_names
from tinymim.study.verbs import resolve, without_added

NAME = re.compile(r"\b(pretrain|distill|finetune|segment)-[0-9a-f]{10}\b")
CHECK = r"sed -E 's/\b(pretrain|distill|finetune|segment)-[0-9a-f]{10}\b/\1-/g' FILE | sha256sum"
FORMER = ("recipe_lines", "config_sha256")  # in settings of results before 2026-12


@dataclass
class Renames:
    """The names to change.

    Attributes:
        results: Result file -> former name of a stage -> current name.
        folders: Former folder of a stage -> current folder, for those that exist.
        left: Result file -> why it keeps its names.
        names: Every known former name of a stage -> its current name.
    """

    results: dict[Path, dict[str, str]] = field(default_factory=dict)
    folders: dict[Path, Path] = field(default_factory=dict)
    left: dict[Path, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.results or self.folders)


def find_former(study: Study, seeds: list[int], data: Mapping[str, Folder], out: Path) -> Renames:
    """Find results and stage folders of a study that have names of the former rule. Nothing is written.

    Args:
        study: The study.
        seeds: Seeds of stage folders without a result; results are found with any seed.
        data: Data of stage folders without a result.
        out: Folder of all studies.
    """
    found = Renames()
    given = {word: folder.content["list_sha256"] for word, folder in data.items()}
    for cell in study.cells:
        files = result_file(study, cell, 0, out).parent.glob("seed*.json")
        own = {int(path.stem[4:]): path for path in files if path.stem[4:].isdigit()}
        for seed in sorted({*seeds, *own}):
            now = settings(cell.stages, study.wanted, seed)
            result = read_json(own[seed], CellResult) if seed in own else None
            theirs = {word: item["list_sha256"] for word, item in result["data"].items()} if result else given
            for contents in (theirs, given):
                if all(word in contents for word in data_words(now)):
                    then = hashed_names(_former_settings(cell, now), contents)
                    found.names |= _renamed(then, stage_names(now, contents))
            if result and result["stages"] != (today := stage_names(now, theirs)) and _is_former(result):
                if why := _other(result, cell, now, theirs):
                    found.left[own[seed]] = why
                else:
                    found.results[own[seed]] = _renamed(result["stages"], today)
                    found.names |= found.results[own[seed]]
    for former, name in found.names.items():
        old, new = Path(out) / "stages" / former, Path(out) / "stages" / name
        if old.is_dir() and not new.exists() and new not in found.folders.values():
            found.folders[old] = new
    return found


def rename(found: Renames, study: Study, out: Path) -> list[str]:
    """Give stages their current names: in results, as folders, and where these refer to each other.

    After an interruption, the next call continues.

    Args:
        found: Result of :func:`find_former`.
        study: The same study.
        out: Folder of all studies.

    Returns:
        A line for each; for a result, the sha256 of its content and of the file before and after.

    Raises:
        CheckFailed: other content would have changed; that file is left as it was.
        ConfigError: a stage is running.
    """
    for old in found.folders:
        _refuse_if_it_runs(old)
    lines = []
    for old, new in found.folders.items():
        for name in ("reads.json", "done.json"):
            if (old / name).is_file():
                _replace_names(old / name, found.names)
        os.rename(old, new)
        lines.append(f"{old.name} -> {new.name}")
    manifest = Path(out) / study.name / "renamed.json"
    noted = read_json(manifest, Renamings)["results"] if manifest.is_file() else []
    for path, names in found.results.items():
        before, file = path.read_text("utf-8-sig"), str(path.relative_to(manifest.parent))
        record = {
            "file": file,
            "content_sha256": content_sha256(before),
            "sha256_before": _sha256(before),
            "sha256_after": _sha256(_with_names(before, names)),
            "stages": names,
        }
        noted = [*(old for old in noted if old["file"] != file or old["sha256_before"] != _sha256(before)), record]
        write_json(manifest, {"content_sha256": CHECK, "results": noted})  # first: no result without proof
        _replace_names(path, names)
        lines.append(
            f"{file}: content {record['content_sha256']} before and after; "
            f"file {record['sha256_before']} -> {record['sha256_after']}"
        )
    return lines


def content_sha256(text: str) -> str:
    """sha256 of a result's text without the hashes in its stage names (:data:`CHECK`)."""
    return _sha256(NAME.sub(r"\1-", text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_names(text: str, names: Mapping[str, str]) -> str:
    """A text with stages renamed."""
    return NAME.sub(lambda match: names.get(match[0], match[0]), text)


def _replace_names(path: Path, names: Mapping[str, str]) -> None:
    """Rename stages in a file; read it back, and refuse if anything else would change."""
    text = path.read_text("utf-8-sig")
    with atomic_path(path) as part:
        part.write_text(_with_names(text, names), "utf-8")
        if content_sha256(part.read_text("utf-8-sig")) != content_sha256(text):
            raise CheckFailed(
                f"{path} would change in more than its stage names",
                "the renamed file has other content",
                "the file is unchanged; please report this",
            )


def _refuse_if_it_runs(folder: Path) -> None:
    with open(folder / "lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is running", "a study runs this stage", "stop that study first (Ctrl-C)"
            ) from None


def _renamed(former: Mapping[str, str], today: Mapping[str, str]) -> dict[str, str]:
    return {former[stage]: name for stage, name in today.items() if stage in former}


def _is_former(result: Mapping[str, Any]) -> bool:
    return not any("resolved" in setting for setting in result["settings"].values())


def _former_settings(cell: Cell, now: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the former rule hashed, from the current files."""
    found = {}
    for name, setting in now.items():
        found[name] = {key: value for key, value in setting.items() if key != "resolved"}
        shipped = RECIPES / f"{setting.get('recipe')}.py"
        if shipped.is_file():
            tree = ast.parse(shipped.read_text("utf-8-sig"))
            lines = map(ast.unparse, tree.body[ast.get_docstring(tree) is not None :])
            found[name]["recipe_lines"] = "; ".join(lines)
        if setting["verb"] == "segment":
            found[name]["config_sha256"] = _config_sha256(str(cell.stages[name]["config"]))
    return found


@functools.cache
def _config_sha256(name: str) -> str:
    """sha256 of an MMSegmentation config with everything it inherits, without overrides."""
    values = load_python(config_file(name)).to_dict()
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _other(result: Mapping[str, Any], cell: Cell, now: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """Why a result does not belong to the study as it is now; "" if it does."""
    then = result["settings"]
    if hashed_names(then, contents) != result["stages"]:
        return "its settings do not give its stage names: it was edited, or renamed for other values"
    if then.keys() != now.keys():
        return f"it has the stages {', '.join(then)}, the study has {', '.join(now)}"
    for name, setting in _former_settings(cell, now).items():
        for key in sorted({*setting, *then[name]} - {"recipe_lines"}):
            if without_added(json.loads(json.dumps(setting.get(key)))) != without_added(then[name].get(key)):
                return f"{name}: {key} was {then[name].get(key)!r}, the study has {setting.get(key)!r}"
        if lines := then[name].get("recipe_lines"):
            flat = flat_options(cell.stages[name])
            if _resolve_lines(lines, json.dumps(flat)) != resolve(flat["verb"], flat):
                return f"{name}: the recipe {setting['recipe']} had other values"
    return ""


@functools.cache
def _resolve_lines(lines: str, options: str) -> dict[str, Any]:
    """The values of a recipe with these lines, next to the current recipes; {} if it cannot be read."""
    flat = json.loads(options)
    with tempfile.TemporaryDirectory() as folder:
        for path in RECIPES.glob("*.py"):
            shutil.copy(path, folder)
        (path := Path(folder) / "former.py").write_text(lines, "utf-8")
        try:
            load_recipe(str(path), verb=flat["verb"])
            return resolve(flat["verb"], flat | {"recipe": str(path)})
        except (ConfigError, SyntaxError):
            return {}
