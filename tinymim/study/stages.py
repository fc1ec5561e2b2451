"""Stages of a study: one run of a verb each, in a folder named by a hash of everything that decides its result.

That is the verb, every value of its resolved recipe or MMSegmentation config (:func:`tinymim.study.verbs.resolve`), the
options that are not recipe keys, the content of the data, and the stages and files it reads. So a stage that several
cells, seeds or studies share is one folder, whatever the name of its recipe and wherever a value is written, and a
changed value gives another folder. The code is not part of the hash: use another ``--out`` for another release.

Options may hold references: ``{seed}``, a data folder (:data:`DATA`), ``{stage.student}``, the student of a stage,
``{stage.classifier}`` and ``{stage.segmentor}``, what a finetune and a segment stage make.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.data.photo_files import list_photos
from tinymim.data.shards import file_bytes
from tinymim.errors import CheckpointError, ConfigError, DataError, did_you_mean
from tinymim.files import describe_files, sha256_file
from tinymim.schema import read_json
from tinymim.study.records import StageDone
from tinymim.study.verbs import PLACES, is_recipe_key, resolve

DATA = {  # reference -> its options
    "photos": ("--data FOLDER",),
    "val_photos": ("--data FOLDER",),
    "segments": ("--seg-data FOLDER",),
    "segment_photos": ("--seg-data FOLDER",),
    "all_photos": ("--data FOLDER", "--seg-data FOLDER"),
    "teacher_weights": ("--teacher-weights FILE",),
    "store": ("--store FOLDER",),
}
WORDS = {
    "photos": "training photos",
    "val_photos": "photos to score on",
    "segments": "labelled photos to segment",
    "segment_photos": "training photos of the labelled folder",
    "all_photos": "training photos, with those of the labelled folder",
    "teacher_weights": "weights of the teacher",
    "store": "stored targets",
}
PRODUCTS = {"segment": "segmentor", "finetune": "classifier"}  # verb -> its file; of the others a student
FILES = ("teacher", "teacher_weights")  # recipe keys that may name a file
AGAIN = "delete the folder of this stage: the study runs it again"
TEXT = ("recipe", "config", "cfg_options")  # options that the resolved values already contain


@dataclass(frozen=True)
class Folder:
    """A data folder, pattern or weight file, and its content (:func:`tinymim.files.describe_files`)."""

    path: Path
    content: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Stage:
    """One run of a verb.

    Attributes:
        folder: ``<out>/stages/<verb>-<hash>``; the run itself is in ``run/``, its output in ``log.txt``, and
            ``done.json`` is written when the command has exited with 0.
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
        """Whether its result exists and was made from the current files of the stages it needs."""
        if (made := self.outcome()) is None or not all(need.done for need in self.needs):
            return False
        return made.get("reads", {}) in ({}, self.reads())

    def outcome(self) -> dict[str, Any] | None:
        """The content of ``done.json``; None if it has not finished."""
        path = self.folder / "done.json"
        return read_json(path, StageDone, fix=AGAIN) if path.is_file() else None

    def reads(self) -> dict[str, str | None]:
        """Folder of each stage it needs -> sha256 of that stage's model; call it when they have finished."""
        return {need.folder.name: (need.outcome() or {}).get("student_sha256") for need in self.needs}


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown name."""
    names = list(known)
    return ConfigError(
        f"unknown {kind} {name!r}",
        f"the choices are {', '.join(names)}",
        did_you_mean(name, names),
    )


def find_data(
    photos: str | None,
    val_photos: str | None,
    segments: str | None,
    teacher_weights: str | None = None,
    store: str | None = None,
) -> dict[str, Folder]:
    """The data folders of a command line, by the word that a study uses for them.

    Args:
        photos: Folder that holds ``train`` and ``val``; or, with ``val_photos``, the training photos themselves.
        val_photos: Validation photos.
        segments: Folder in ADE20K layout.
        teacher_weights: A weight file.
        store: What ``tinymim cache`` wrote; its header stands for its content.

    Raises:
        CheckpointError: no such file.
        DataError: a folder that is missing or holds no photo, or no store.
    """
    folders: dict[str, str | Path] = {"segments": segments} if segments else {}
    if photos and val_photos:
        folders |= {"photos": photos, "val_photos": val_photos}
    elif photos:
        folders |= {"photos": Path(photos) / "train", "val_photos": Path(photos) / "val"}
        if not all(Path(folder).is_dir() for folder in folders.values()):
            raise DataError(
                f"no train and val in {photos}",
                "--data must name a folder that holds both",
                "give such a folder, or --data TRAINING_PHOTOS --val-data VALIDATION_PHOTOS",
            )
    folders = {word: Path(path).resolve() for word, path in folders.items()}
    if segments and (own := Path(folders["segments"]) / "images" / "training").is_dir():
        folders["segment_photos"] = own
    found = {
        word: Folder(Path(path), describe_files(path, list_photos(path, labels=True), file_bytes))
        for word, path in folders.items()
    }
    if "photos" in found and "segment_photos" in found:
        both = [found["photos"], found["segment_photos"]]
        pattern = Path("{" + ",".join(str(folder.path) for folder in both) + "}")
        hashes = "+".join(folder.content["list_sha256"] for folder in both)
        found["all_photos"] = Folder(
            pattern,
            {
                "folder": " + ".join(folder.content["folder"] for folder in both),
                "files": sum(folder.content["files"] for folder in both),
                "list_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            },
        )
    if teacher_weights:
        file = Path(teacher_weights).resolve()
        if not file.is_file():
            raise CheckpointError(f"no file at {teacher_weights}", "it does not exist", "check --teacher-weights")
        found["teacher_weights"] = Folder(file, {"folder": file.name, "files": 1, "list_sha256": sha256_file(file)})
    if store:
        header = Path(store).resolve() / "store.json"
        if not header.is_file():
            raise DataError(
                f"no target store at {store}", "there is no store.json", "write one: tinymim cache, and check --store"
            )
        about = {"folder": header.parent.name, "files": 1, "list_sha256": sha256_file(header)}
        found["store"] = Folder(header.parent, about)
    return found


def settings(stages: Mapping[str, Any], wanted: Iterable[str], seed: int) -> dict[str, Any]:
    """Stage -> its verb and options as written in a study, and under "resolved" every value that follows from them.

    The wanted stages and their dependencies, dependencies first, with the seed filled in and files replaced by their
    sha256; without :data:`tinymim.study.verbs.PLACES`.

    Raises:
        ConfigError: a reference to nothing, a stage that needs itself, or a recipe or config that cannot be resolved.
    """
    found: dict[str, Any] = {}
    visiting: list[str] = []
    products = {name: PRODUCTS.get(str(each.get("verb")), "student") for name, each in stages.items()}

    def known(word: str) -> Any:
        stage, _, what = word.partition(".")
        if stage in stages and what == products[stage]:
            visit(stage)
        elif word not in ("seed", *DATA):
            raise unknown("reference", word, ["seed", *DATA, *(f"{name}.{made}" for name, made in products.items())])
        return seed if word == "seed" else f"{{{word}}}"

    def visit(name: str) -> None:
        if name in found:
            return
        if name in visiting:
            raise ConfigError(
                f"stage {name!r} needs itself", " -> ".join([*visiting, name]), "let it read an earlier stage"
            )
        visiting.append(name)
        flat = flat_options(stages[name])
        options = {key: _by_content(value) for key, value in _fill_references(flat, known).items() if key not in PLACES}
        if "pseudo" in options:
            options["pseudo"] = _pseudo_photos(options["pseudo"])
        values = _fill_references(resolve(flat["verb"], flat), known)
        found[name] = options | {"resolved": values | {k: _by_content(values[k]) for k in FILES if k in values}}
        visiting.pop()

    for name in wanted:
        visit(name)
    return found


def stage_names(settings: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, str]:
    """Stage -> name of its folder, ``<verb>-<hash>``.

    Args:
        settings: Result of :func:`settings`, with all dependencies.
        contents: Data word (:data:`DATA`) -> list_sha256 of the folder.
    """
    return hashed_names({name: _hashed_part(setting) for name, setting in settings.items()}, contents)


def data_words(settings: Mapping[str, Any]) -> list[str]:
    """The data (:data:`DATA`) that stages with these settings read."""
    text = json.dumps(settings)
    return [word for word in DATA if f'"{{{word}}}"' in text]


def make_stages(
    stages: Mapping[str, Any], wanted: Iterable[str], seed: int, data: Mapping[str, Folder], out: Path
) -> dict[str, Stage]:
    """Name -> stage, dependencies first.

    Raises:
        ConfigError: data that was not given.
    """
    made: dict[str, Stage] = {}
    all_settings = settings(stages, wanted, seed)
    for word in data_words(all_settings):
        if word not in data:
            raise ConfigError(f"no {WORDS[word]}", "a stage of this study reads them", f"add {' '.join(DATA[word])}")
    names = stage_names(all_settings, {word: folder.content["list_sha256"] for word, folder in data.items()})
    for name, folder in names.items():
        needs: dict[str, Stage] = {}

        def value_of(word: str, needs: dict[str, Stage] = needs) -> Any:
            stage, _, what = word.partition(".")
            if stage in made:
                needs[stage] = made[stage]
                return str(made[stage].run / f"{what}.pth")
            return seed if word == "seed" else str(data[word].path)

        options = _fill_references(flat_options(stages[name]), value_of)
        verb = options.pop("verb")
        made[name] = Stage(out / "stages" / folder, verb, options, tuple(needs.values()))
    return made


def _hashed_part(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a stage's settings that is hashed; an option that is also a resolved value is hashed once."""
    verb = setting["verb"]
    twice = {
        key for key, value in setting["resolved"].items() if setting.get(key) == value and is_recipe_key(verb, key)
    }
    return {key: value for key, value in setting.items() if key not in TEXT and key not in twice}


def hashed_names(hashed: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, str]:
    """Stage -> verb and hash of the given values, with references to data and stages replaced by their hashes."""
    names: dict[str, str] = {}

    def content(word: str) -> Any:
        stage = word.partition(".")[0]
        return names[stage] if stage in names else contents.get(word)

    for name, values in hashed.items():
        text = json.dumps(_fill_references(values, content), sort_keys=True)
        names[name] = f"{values['verb']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return names


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
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


def _fill_references(value: Any, known: Callable[[str], Any]) -> Any:
    """Replace every "{reference}" in a value."""
    if isinstance(value, dict):
        return {key: _fill_references(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_references(item, known) for item in value]
    match = re.fullmatch(r"\{([\w.]+)\}", value) if isinstance(value, str) else None
    return known(match[1]) if match else value


_sha256 = functools.cache(sha256_file)


def _by_content(value: Any) -> Any:
    """Replace the path of a file by its sha256; return other values unchanged."""
    return {"sha256": _sha256(value)} if isinstance(value, str) and Path(value).is_file() else value


def _pseudo_photos(value: str) -> dict[str, Any]:
    """``LAYOUT[=WEIGHT]`` of a segment stage by the names and sizes of the folder's files.

    Raises:
        DataError: no such folder, or no photo in it.
    """
    from tinymim.seg.config import parse_pseudo

    found = parse_pseudo(value)
    root = found["data_root"]
    return found | {"data_root": describe_files(root, list_photos(root, option="pseudo", labels=True))["list_sha256"]}
