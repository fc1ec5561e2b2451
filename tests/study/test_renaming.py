"""Results and stages from before 2026-12: renamed once, contents untouched, anything else left alone and said."""

import fcntl
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.study.test_study import CELLS, fake, folders, run, started, table, write  # noqa: F401  (fixtures)
from tinymim import cli
from tinymim.study import renaming
from tinymim.study.definition import load_study, make_trials
from tinymim.study.stages import find_data, hashed_names, settings

DOCS = Path(__file__).parents[2] / "docs/studies"


def texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.json"))}


@pytest.fixture
def former(fake, folders):  # noqa: F811
    """A study that was run before 2026-12: its file, and what was in its folder of studies."""
    path = write(fake, seeds=[0])
    assert run(path, folders) == 0
    out, study = fake / "out", load_study(str(path))
    data = find_data(str(folders / "photos"), None, None)
    contents = {word: folder.content["list_sha256"] for word, folder in data.items()}
    names = {}
    for trial in make_trials(study, study.cells, [0], data, out):
        now = settings(trial.cell.stages, study.wanted, 0)
        then = renaming._former_settings(trial.cell, now)
        old = hashed_names(then, contents)
        names |= {stage.folder.name: old[name] for name, stage in trial.stages.items()}
        trial.file.write_text(json.dumps(json.loads(trial.file.read_text()) | {"settings": then}, indent=1) + "\n")
    for file in (*out.rglob("seed*.json"), *out.rglob("done.json"), *out.rglob("reads.json")):
        file.write_text(renaming.NAME.sub(lambda match: names[match[0]], file.read_text()))
    for new, old in names.items():
        (out / "stages" / new).rename(out / "stages" / old)
    return path, texts(out), names


def test_renamed_once_and_nothing_is_run_again(former, folders, capsys):  # noqa: F811
    path, before, names = former
    out = path.parent / "out"
    for more in ([], ["--table"]):
        assert run(path, folders, *more) == 2
        assert "3 results and 6 stages" in (said := capsys.readouterr().err)
        assert "--rename-stages" in said
    assert texts(out) == before
    begun = started(path)
    assert run(path, folders, "--rename-stages") == 0
    printed = capsys.readouterr().out
    assert {p.name for p in (out / "stages").iterdir()} == set(names)
    assert not set(names) & set(names.values())
    after = texts(out)
    for record in json.loads((out / "mine/renamed.json").read_text())["results"]:
        file = f"mine/{record['file']}"
        assert hashlib.sha256(before[file].encode()).hexdigest() == record["sha256_before"]
        assert hashlib.sha256(after[file].encode()).hexdigest() == record["sha256_after"]
        assert {new: old for old, new in record["stages"].items()}.items() <= names.items()
        assert record["content_sha256"] in printed
        was, now = json.loads(before[file]), json.loads(after[file])
        assert was.pop("stages") != now.pop("stages")
        assert was == now
    assert run(path, folders) == 0  # all found
    shutil.rmtree(out / "mine/cells")
    assert run(path, folders) == 0  # the stages, too: nothing is trained anew
    assert {names[name]: lines for name, lines in started(path).items()} == begun
    assert run(path, folders, "--rename-stages") == 0
    assert "nothing to rename" in capsys.readouterr().out


def test_a_wrong_folder_is_not_filled_with_an_empty_table(former, folders, capsys):  # noqa: F811
    path, _, _ = former
    options = ["--data", str(folders / "photos"), "--out", str(path.parent / "wrong"), "--rename-stages"]
    assert cli.main(["study", str(path), *options]) == 2
    assert "nothing of mine is in" in capsys.readouterr().err
    assert not (path.parent / "wrong").exists()


def test_stages_without_results_are_found(former, folders):  # noqa: F811
    path, _, names = former
    shutil.rmtree(path.parent / "out/mine/cells")
    begun = started(path)
    assert run(path, folders, "--rename-stages") == 0
    assert run(path, folders) == 0
    assert {names[name]: lines for name, lines in started(path).items()} == begun


def test_a_rename_that_was_interrupted_is_taken_up(former, folders, monkeypatch):  # noqa: F811
    path, _, names = former
    moved, rename = [], renaming.os.rename

    def stop(*args):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(args)
        rename(*args)

    monkeypatch.setattr(renaming.os, "rename", stop)
    assert run(path, folders, "--rename-stages") == 130
    monkeypatch.setattr(renaming.os, "rename", rename)
    begun = started(path)
    assert run(path, folders, "--rename-stages") == 0
    shutil.rmtree(path.parent / "out/mine/cells")
    assert run(path, folders) == 0
    assert {names.get(name, name): lines for name, lines in started(path).items()} == {
        names.get(name, name): lines for name, lines in begun.items()
    }


def test_what_is_not_the_same_is_left_alone(former, folders, capsys):  # noqa: F811
    """An edited result, one of other settings: said, exit code 1, untouched."""
    path, before, _ = former
    out = path.parent / "out"
    edited = out / "mine/cells/a-b/seed0.json"
    edited.write_text(edited.read_text().replace('"verb": "finetune"', '"verb": "finetune", "lr": 1'))
    text = edited.read_text()
    write(path.parent, seeds=[0], cells=[*CELLS[:2], dict(CELLS[2], set={"finetune.top1": 0.9})])
    assert run(path, folders, "--rename-stages") == 1
    said = capsys.readouterr().err
    assert re.search(r"a-b/seed0.json: its settings do not give its stage names", said)
    assert re.search(r"d-plain/seed0.json: \w+: .* the study has", said)
    assert edited.read_text() == text
    assert texts(out)["mine/cells/d-plain/seed0.json"] == before["mine/cells/d-plain/seed0.json"]
    assert texts(out)["mine/cells/c/seed0.json"] != before["mine/cells/c/seed0.json"]
    assert [row["n"] for row in table(path)["rows"]] == [0, 1, 0]


def test_recipes_of_before_are_compared_by_value(tmp_path, capsys):
    """The lines that a result holds are resolved beside the bases of today: another text is no other recipe."""
    study = load_study("table11_chain_small")
    shutil.copytree(DOCS / study.name / "cells/from-mae-s", tmp_path / study.name / "cells/from-mae-s")
    files = sorted((tmp_path / study.name / "cells").glob("*/*.json"))
    committed = [json.loads(file.read_text())["stages"] for file in files]
    for file, now in zip(
        files, ("color_jitter = 0.3", "color_jitter = None or None", "color_jitter = None"), strict=True
    ):
        value = json.loads(file.read_text())
        pretrained = next(s for s in value["settings"].values() if s["verb"] == "pretrain")
        assert "color_jitter = None" in pretrained["recipe_lines"]
        pretrained["recipe_lines"] = pretrained["recipe_lines"].replace("color_jitter = None", now)
        contents = {word: item["list_sha256"] for word, item in value["data"].items()}
        value["stages"] = hashed_names(value["settings"], contents)
        file.write_text(json.dumps(value, indent=1) + "\n")
    assert cli.main(["study", study.name, "--out", str(tmp_path), "--rename-stages"]) == 1
    said = capsys.readouterr()
    assert re.search(r"seed0.json: \w+: the recipe mae_\w+ had other values", said.err)
    assert said.err.count("unchanged: ") == 1
    renamed = [json.loads(file.read_text())["stages"] for file in files]
    assert renamed[0] != committed[0]
    assert renamed[1:] == committed[1:]


def test_a_stage_that_runs_is_not_renamed(former, folders, capsys):  # noqa: F811
    path, before, _ = former
    stage = next((path.parent / "out/stages").iterdir())
    with open(stage / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(path, folders, "--rename-stages") == 2
    assert "stop that study first" in capsys.readouterr().err
    assert texts(path.parent / "out") == before


def test_the_committed_results_are_what_was_measured():
    """Each with a proof: the names of before put back give the very file of before."""
    for manifest in DOCS.glob("*/renamed.json"):
        for record in json.loads(manifest.read_text())["results"]:
            text = (manifest.parent / record["file"]).read_text()
            assert hashlib.sha256(text.encode()).hexdigest() == record["sha256_after"]
            assert renaming.content_sha256(text) == record["content_sha256"]
            former_names = {new: old for old, new in record["stages"].items()}
            original = renaming.NAME.sub(lambda match, names=former_names: names[match[0]], text)
            assert hashlib.sha256(original.encode()).hexdigest() == record["sha256_before"]
            assert renaming.content_sha256(original) == record["content_sha256"]
    proved = {m.parent / r["file"] for m in DOCS.glob("*/renamed.json") for r in json.loads(m.read_text())["results"]}
    of_before = {p for p in DOCS.glob("*/cells/*/seed*.json") if '"resolved"' not in p.read_text()}
    assert of_before == proved
