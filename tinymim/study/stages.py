"""Stages of a study: one run of a verb each, in a folder whose name ends in a hash of what its numbers follow from.

That is the verb, its options, its recipe's own lines or its whole MMSegmentation config, the content of the data and
the stages it reads from. So a stage that several cells, seeds or studies have in common is one folder, and a changed
option is another folder. What a recipe inherits and the code itself do not enter: another release, another ``--out``.

Options may hold references: ``{seed}``, a data folder (:data:`DATA`), or ``{stage.student}``, what another stage left.
"""

import ast
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from tinymim.data.photos import list_photos
from tinymim.engine.recipe import FOLDER as RECIPES
from tinymim.errors import ConfigError, DataError
from tinymim.files import config_file, describe_files, sha256_file

DATA = {"photos": "--data", "val_photos": "--data", "segments": "--seg-data"}  # reference -> option that gives it
WORDS = {"photos": "training photos", "val_photos": "photos to score on", "segments": "labelled photos to segment"}
PLACES = ("workers", "device")  # options that leave the numbers alone


@dataclass(frozen=True)
class Folder:
    """A data folder: where it is, and what it is (:func:`tinymim.files.describe_files`)."""

    path: Path
    content: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Stage:
    """One run of a verb.

    Attributes:
        folder: ``<out>/stages/<verb>-<hash>``; the run itself is in ``run/``, its output in ``log.txt``, and
            ``done.json`` is written when the command has ended with 0.
        verb: "pretrain", "distill", "finetune" or "segment".
        options: Long options without dashes -> values.
        needs: Stages it reads from.
    """

    folder: Path
    verb: str
    options: dict[str, Any]
    needs: tuple["Stage", ...]

    @property
    def run(self) -> Path:
        """The verb's run folder."""
        return self.folder / "run"

    @property
    def done(self) -> bool:
        """Whether its numbers are there, and made from what the stages it needs have left."""
        if (made := self.ended()) is None or not all(need.done for need in self.needs):
            return False
        return made.get("reads", {}) in ({}, self.reads())

    def ended(self) -> dict[str, Any] | None:
        """What was noted when it ended; None where it has not."""
        path = self.folder / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def reads(self) -> dict[str, str | None]:
        """Folder of each stage it needs -> sha256 of what that has left; to be asked when these have ended."""
        return {need.folder.name: (need.ended() or {}).get("student_sha256") for need in self.needs}


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of the known ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return ConfigError(
        f"unknown {kind} {name!r}",
        f"there is {', '.join(names)}",
        f"did you mean {near[0]!r}?" if near else "choose one of these",
    )


def find_data(photos: str | None, val_photos: str | None, segments: str | None) -> dict[str, Folder]:
    """The data folders of a command line, by the word a study refers to them with.

    Args:
        photos: Folder with ``train`` and ``val`` in it; or, with ``val_photos``, the training photos themselves.
        val_photos: Validation photos.
        segments: Folder in ADE20K layout.

    Raises:
        DataError: a folder that is missing or holds no photo.
    """
    folders: dict[str, str | Path] = {"segments": segments} if segments else {}
    if photos and val_photos:
        folders |= {"photos": photos, "val_photos": val_photos}
    elif photos:
        folders |= {"photos": Path(photos) / "train", "val_photos": Path(photos) / "val"}
        if not all(Path(folder).is_dir() for folder in folders.values()):
            raise DataError(
                f"no train and val in {photos}",
                "--data names a folder that holds both",
                "give that, or --data TRAINING_PHOTOS --val-data VALIDATION_PHOTOS",
            )
    return {
        word: Folder(Path(path).resolve(), describe_files(path, list_photos(path))) for word, path in folders.items()
    }


def settings(stages: Mapping[str, Any], wanted: Iterable[str], seed: int) -> dict[str, Any]:
    """Stage -> verb and options with the seed filled in; the wanted stages and those they need, these first.

    Files enter by their content, a shipped recipe by its own lines too; :data:`PLACES` do not enter. What a recipe
    inherits and the code itself do not enter either: another release wants another ``--out``.

    Raises:
        ConfigError: a reference to nothing, or a stage that needs itself.
    """
    found: dict[str, Any] = {}
    begun: list[str] = []

    def known(word: str) -> Any:
        stage, _, what = word.partition(".")
        if what == "student" and stage in stages:
            visit(stage)
        elif word not in ("seed", *DATA):
            raise unknown("reference", word, ["seed", *DATA, *(f"{name}.student" for name in stages)])
        return seed if word == "seed" else f"{{{word}}}"

    def visit(name: str) -> None:
        if name in found:
            return
        if name in begun:
            raise ConfigError(f"stage {name!r} needs itself", " -> ".join([*begun, name]), "let it read an earlier one")
        begun.append(name)
        options = {k: _content(v) for k, v in _fill(_flat(stages[name]), known).items() if k not in PLACES}
        shipped = RECIPES / f"{options.get('recipe')}.py"
        found[name] = options | ({"recipe_lines": _code(shipped)} if shipped.is_file() else {})
        if options.get("verb") == "segment":
            found[name]["config_sha256"] = _config_sha256(config_file(str(stages[name].get("config"))))
        begun.pop()

    for name in wanted:
        visit(name)
    return found


def make_stages(
    stages: Mapping[str, Any], wanted: Iterable[str], seed: int, data: Mapping[str, Folder], out: Path
) -> dict[str, Stage]:
    """Stage -> what is run for it, those that others need first.

    Raises:
        ConfigError: data that was not given.
    """
    made: dict[str, Stage] = {}

    def folder(word: str) -> Folder:
        if word not in data:
            raise ConfigError(f"no {WORDS[word]}", "a stage of this study reads them", f"add {DATA[word]} FOLDER")
        return data[word]

    for name, setting in settings(stages, wanted, seed).items():
        needs: dict[str, Stage] = {}

        def typed(word: str, needs: dict[str, Stage] = needs) -> Any:
            stage = word.partition(".")[0]
            if stage in made:
                needs[stage] = made[stage]
                return str(made[stage].run / "student.pth")
            return seed if word == "seed" else str(folder(word).path)

        def hashed(word: str) -> str:
            stage = word.partition(".")[0]
            return made[stage].folder.name if stage in made else folder(word).content["list_sha256"]

        options = _fill(_flat(stages[name]), typed)
        text = json.dumps(_fill(setting, hashed), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        verb = options.pop("verb")
        made[name] = Stage(out / "stages" / f"{verb}-{digest}", verb, options, tuple(needs.values()))
    return made


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that are None, and ``cfg_options`` as dotted keys."""

    def walk(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if isinstance(item, dict):
                yield from walk(f"{prefix}{key}.", item)
            else:
                yield f"{prefix}{key}", item

    inner = {key: value for key, value in walk("", options.get("cfg_options") or {}) if value is not None}
    plain = {key: value for key, value in options.items() if key != "cfg_options" and value is not None}
    return plain | ({"cfg_options": inner} if inner else {})


def _fill(value: Any, known: Callable[[str], Any]) -> Any:
    """A value with every "{reference}" in it replaced."""
    if isinstance(value, dict):
        return {key: _fill(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, known) for item in value]
    match = re.fullmatch(r"\{([\w.]+)\}", value) if isinstance(value, str) else None
    return known(match[1]) if match else value


_sha256 = functools.cache(sha256_file)


def _content(value: Any) -> Any:
    """A file by what is in it; other values as they are."""
    return {"sha256": _sha256(value)} if isinstance(value, str) and Path(value).is_file() else value


@functools.cache
def _config_sha256(path: Path) -> str:
    """Of an MMSegmentation config with everything it inherits."""
    return hashlib.sha256(json.dumps(Config.fromfile(path).to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def _code(path: Path) -> str:
    """A Python file without its docstring and comments."""
    tree = ast.parse(path.read_text())
    return "; ".join(map(ast.unparse, tree.body[ast.get_docstring(tree) is not None :]))
