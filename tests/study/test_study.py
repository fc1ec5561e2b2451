"""Studies: what is run once, what is run again, failures, signals, locks, tables; one real study of tiny models."""

import argparse
import fcntl
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from tinymim.cli import main
from tinymim.data.photo_files import list_photos
from tinymim.engine import load_recipe
from tinymim.errors import CheckpointError, ConfigError, DataError, TinyMIMError
from tinymim.study import run as study_run
from tinymim.study.definition import FOLDER, load_study, make_trials, slug, study_names
from tinymim.study.run import command, open_stages
from tinymim.study.stages import find_data, make_stages
from tinymim.study.table import compare, holm

FAKE = """
import json, os, pathlib, signal, sys, time
options, run = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
(run / "config.py").touch()
def save(*_):
    (run / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
with open(run / "argv.txt", "a") as file:
    file.write(f"{' '.join(sys.argv[3:])} {time.time()}\\n")
time.sleep(options.get("sleep", 0))
if options.get("fail") and not (run.parent.parent.parent / "mended").exists():
    sys.exit("no luck today")
(run / "student.pth").write_text(json.dumps(options))
(run / "result.json").write_text(json.dumps({"top1": options.get("top1", 0.5) + 0.01 * options.get("seed", 0)}))
with open(run / "argv.txt", "a") as file:
    file.write(f"end {time.time()}\\n")
(run / "gpu.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
"""
STAGES = {
    "teacher": dict(verb="pretrain", data="{photos}", seed=0, top1=0.1),
    "distill": dict(verb="distill", teacher="{teacher.student}", data="{photos}", seed="{seed}", workers=1),
    "finetune": dict(
        verb="finetune", student="{distill.student}", data="{photos}", val_data="{val_photos}", seed="{seed}", top1=0.5
    ),
}
CELLS = [
    dict(name="A + B", paper=84.0, set={"finetune.top1": 0.6}),
    dict(name="C", paper=83.0),
    dict(name="D, plain", paper=83.0, set={"distill.cfg_options.mask": "both"}),
]
ONLY = dict(title="A study", stages=STAGES, score="finetune.top1", paper=dict(table=7, metric="top-1"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photos of two classes in train, of one in val, and a labelled folder."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder, count in (
        ("photos/train/a", 8),
        ("photos/train/b", 8),
        ("photos/val/a", 2),
        ("segments/images/training", 1),
    ):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(root / folder / f"{i}.jpg")
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Every stage is a small script that leaves the score it is given."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(
        study_run,
        "command",
        lambda stage: [sys.executable, str(tmp_path / "fake.py"), json.dumps(stage.options), str(stage.run)],
    )
    monkeypatch.setattr(study_run, "POLL", 0.02)
    return tmp_path


def write(folder, **keys):
    """A study file."""
    path = folder / "mine.py"
    given = ONLY | dict(cells=CELLS, seeds=[0, 1]) | keys
    path.write_text('"""A study."""\n' + "".join(f"{key} = {value!r}\n" for key, value in given.items()))
    return path


def run(path, folders, *more):
    return main(["study", str(path), "--data", str(folders / "photos"), "--out", str(path.parent / "out"), *more])


def table(path):
    return json.loads((path.parent / "out/mine/table.json").read_text())


def started(path):
    """Stage folder -> how often it was started, and with what."""
    return {
        p.parent.parent.name: [line for line in p.read_text().splitlines() if not line.startswith("end")]
        for p in (path.parent / "out/stages").glob("*/run/argv.txt")
    }


def test_stages_are_run_once_and_results_kept(fake, folders, capsys):
    """The teacher once, a distillation shared by two cells, nothing twice, and only what a change concerns again."""
    path = write(fake)
    assert run(path, folders) == 0
    begun = started(path)
    assert [len(v) for v in begun.values()] == [1] * (1 + 2 * 2 + 3 * 2)
    result = json.loads((fake / "out/mine/cells/a-b/seed1.json").read_text())
    assert result["scores"] == {"finetune.top1": 0.61}
    assert list(result["seconds"]) == ["teacher", "distill", "finetune"]
    assert result["settings"]["distill"]["teacher"] == "{teacher.student}"
    assert len(result["student_sha256"]["distill"]) == 64
    assert str(fake) not in json.dumps(result)
    first = table(path)
    assert [row["scores"]["finetune.top1"]["mean"] for row in first["rows"]] == pytest.approx([0.605, 0.505, 0.505])
    assert run(path, folders) == 0
    assert started(path) == begun
    assert table(path) == first
    changed = [*CELLS[:2], dict(name="D, plain", set={"distill.cfg_options.mask": "student"})]
    assert run(write(fake, cells=changed), folders) == 0
    assert len(started(path)) == len(begun) + 2 * 2
    assert run(write(fake, cells=changed), folders, "--seeds", "5", "--only", "A + B", "--parallel", "2") == 0
    assert len(started(path)) == len(begun) + 2 * 2 + 2
    assert [row["n"] for row in table(path)["rows"]] == [1, 0, 0]
    capsys.readouterr()


def test_a_result_file_is_enough(fake, folders):
    """Stages may be thrown away; the table alone needs no data; other settings make a result disappear from it."""
    path = write(fake)
    assert run(path, folders) == 0
    shutil.rmtree(fake / "out/stages")
    assert run(path, folders) == 0
    assert not (fake / "out/stages").exists()
    write(fake, cells=[dict(CELLS[0], set={"finetune.top1": 0.7}), *CELLS[1:]])
    assert main(["study", str(path), "--out", str(fake / "out"), "--table"]) == 0
    assert [row["n"] for row in table(path)["rows"]] == [0, 2, 2]
    assert "not run" in (fake / "out/mine/table.md").read_text()


def test_cells_that_rest_on_two_teachers_are_not_compared(fake, folders):
    """A stage that was trained anew (other machine, stages thrown away) is another file: the table says so."""
    path = write(fake)
    assert run(path, folders, "--only", "a-b") == 0
    shutil.rmtree(fake / "out/stages")
    (fake / "fake.py").write_text(FAKE.replace("json.dumps(options))", "json.dumps(options) + ' elsewhere')", 1))
    assert run(path, folders) == 0
    found = table(path)
    assert [stage.split()[0] for stage in found["apart"]] == ["teacher", "distill", "distill"]  # those of both seeds
    files = next(iter(found["apart"].values()))
    assert len(files) == 2
    verdicts = {(pair["better"], pair["worse"]): pair for pair in found["pairs"]}
    pair = verdicts["A + B", "C"]
    assert pair["verdict"].startswith("a shared stage trained apart")
    assert (pair["p"], pair["t"]) == (None, None)
    text = (fake / "out/mine/table.md").read_text()
    assert files[1] in text
    assert "2 without a statement" in text
    shutil.rmtree(fake / "out")
    assert run(path, folders) == 0
    assert table(path)["apart"] == {}
    assert "trained apart" not in (fake / "out/mine/table.md").read_text()


def test_other_data_is_another_run(fake, folders, tmp_path, capsys):
    path = write(fake, cells=CELLS[:2])
    assert run(path, folders, "--only", "C") == 0
    count = len(started(path))
    shutil.copytree(folders / "photos", tmp_path / "moved/photos")
    assert run(path, tmp_path / "moved", "--only", "C") == 0  # the same photos elsewhere
    assert len(started(path)) == count
    shutil.copy(folders / "photos/train/a/0.jpg", tmp_path / "moved/photos/train/a/more.jpg")
    assert run(path, tmp_path / "moved", "--only", "a-b") == 0
    assert len(started(path)) == 2 * count
    assert [row["n"] for row in table(path)["rows"]] == [2, 0]
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--table"]) == 2
    assert "several datasets" in capsys.readouterr().err


def test_what_was_made_from_another_teacher_is_made_again(fake, folders):
    """A teacher came out anew: distillations of the old one are neither taken for its own nor resumed."""
    path = write(fake, cells=CELLS[1:2], seeds=[0])
    assert run(path, folders) == 0
    stages = {p.name.split("-")[0]: p for p in (fake / "out/stages").iterdir()}
    done = json.loads((stages["distill"] / "done.json").read_text())
    assert done["reads"] == {
        stages["pretrain"].name: json.loads((stages["pretrain"] / "done.json").read_text())["student_sha256"]
    }
    shutil.rmtree(fake / "out/mine")
    shutil.rmtree(stages["pretrain"])
    assert run(path, folders) == 0  # the same file again: only the teacher is run
    assert {name: len(lines) for name, lines in started(path).items()} == {p.name: 1 for p in stages.values()}
    shutil.rmtree(fake / "out/mine")
    shutil.rmtree(stages["pretrain"])
    (fake / "fake.py").write_text(FAKE.replace("json.dumps(options))", "json.dumps(options) + ' elsewhere')", 1))
    assert run(path, folders) == 0
    assert {name: lines[-1].split()[0] for name, lines in started(path).items() if len(lines) > 1} == {
        stages["distill"].name: "--overwrite",
        stages["finetune"].name: "--overwrite",
    }


def test_failure_spares_the_other_cells(fake, folders, capsys):
    """A failed stage fails its cells, with the end of its log; the rest is run; the next try resumes it."""
    path = write(fake, cells=[dict(name="bad", set={"distill.fail": True}), CELLS[1]])
    assert run(path, folders) == 1
    said = capsys.readouterr().err
    assert "failed: bad, seed0" in said
    assert "no luck today" in said
    assert [(row["n"], row["failed"]) for row in table(path)["rows"]] == [(0, [0, 1]), (2, [])]
    assert "failed" in (fake / "out/mine/table.md").read_text()
    (fake / "out/mended").touch()
    assert run(path, folders) == 0
    again = [lines for lines in started(path).values() if len(lines) == 2]
    assert len(again) == 2
    assert all(lines[1].startswith("--resume") for lines in again)
    assert [row["n"] for row in table(path)["rows"]] == [2, 2]


def test_a_score_that_is_not_there(fake, folders, capsys):
    path = write(fake, score="finetune.top5", seeds=[0], cells=[CELLS[1]])
    assert run(path, folders) == 1
    assert "has no 'top5', only top1" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_lets_the_children_save(fake, folders, capsys, number):
    path = write(fake, cells=[dict(name="slow", set={"distill.sleep": 30})], seeds=[0, 1])

    def interrupt():
        while len(list(fake.glob("out/stages/distill-*/run/argv.txt"))) < 2:
            time.sleep(0.02)
        for _ in range(2):  # as "timeout" does
            os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run(path, folders, "--parallel", "2") == 130
    assert "the same command continues them" in capsys.readouterr().err
    assert len(list(fake.glob("out/stages/distill-*/run/saved"))) == 2
    (stage,) = [p.parent for p in fake.glob("out/stages/*/done.json")]
    assert stage.name.startswith("pretrain")
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_two_studies_never_run_one_stage(fake, folders):
    """A stage whose lock another process holds is waited for, and its result is taken."""
    path = write(fake, cells=CELLS[1:2], seeds=[0])
    data = find_data(str(folders / "photos"), None, None)
    study = load_study(str(path))
    teacher = make_trials(study, study.cells, [0], data, fake / "out")[0].stages["teacher"]
    teacher.run.mkdir(parents=True)
    with open(teacher.folder / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = {"result": {}, "seconds": [1.0], "student_sha256": None, "machine": {}}
        late = threading.Timer(0.5, lambda: (teacher.folder / "done.json").write_text(json.dumps(done)))
        late.start()
        assert run(path, folders) == 0
    assert not (teacher.run / "argv.txt").exists()
    assert table(path)["rows"][0]["n"] == 1


@pytest.mark.parametrize(("shown", "expected"), [("4,7", {"4", "7"}), ("3", {"3"})])
def test_each_job_has_a_gpu_of_its_own(fake, folders, monkeypatch, shown, expected):
    """With several GPUs two jobs at once share none; a single one is left to both."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    slow = [dict(name=name, set={"distill.sleep": 0.5, "distill.cfg_options.mask": name}) for name in "ab"]
    assert run(write(fake, cells=slow, paper={}, seeds=[0]), folders, "--parallel", "2") == 0
    assert {path.read_text() for path in fake.glob("out/stages/distill-*/run/gpu.txt")} == expected


def test_parallel_keeps_the_order(fake, folders):
    """At most N at a time, and nothing before what it reads from."""
    changes = {f"{stage}.sleep": 0.15 for stage in ("teacher", "distill", "finetune")}
    path = write(fake, cells=[dict(name="one", set=changes)], seeds=[0, 1, 2])
    assert run(path, folders, "--parallel", "2") == 0
    spans = {}
    for file in fake.glob("out/stages/*/run/argv.txt"):
        begin, end = (float(line.split()[-1]) for line in file.read_text().splitlines())
        spans.setdefault(file.parent.parent.name.split("-")[0], []).append((begin, end))
    assert max(end for _, end in spans["pretrain"]) <= min(begin for begin, _ in spans["distill"])
    assert min(end for _, end in spans["distill"]) <= min(begin for begin, _ in spans["finetune"])
    every = [span for some in spans.values() for span in some]
    at_once = [sum(b <= begin < e for b, e in every) for begin, _ in every]
    assert max(at_once) == 2
    machine = json.loads(next(fake.glob("out/stages/*/done.json")).read_text())["machine"]
    assert machine["threads"] == max(machine["cores"] // 2, 1)


def test_time_limit_and_dry_run(fake, folders, capsys):
    path = write(fake)
    assert run(path, folders, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "3 cells x 2 seeds, 0 of 6 done; 11 stages to run" in said
    assert len([line for line in said.splitlines() if "fake.py" in line or "-m tinymim" in line]) == 11
    assert not (fake / "out").exists()
    assert run(path, folders, "--time-limit", "0") == 0
    assert started(path) == {}
    assert [row["n"] for row in table(path)["rows"]] == [0, 0, 0]
    assert [pair["verdict"] for pair in table(path)["pairs"]] == ["not run", "not run"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(titel="x"), "did you mean 'title'"),
        (dict(title=""), "has no 'title'"),
        (dict(cells=[dict(name="x", sets={})]), "did you mean 'set'"),
        (dict(cells=[dict(name="A"), dict(name="a.")]), "their names must differ"),
        (dict(cells=[]), "there must be at least one cell"),
        (dict(cells=[dict(name="x", set={"distil.lr": 1})]), "did you mean 'distill'"),
        (dict(cells=[dict(name="x", set={"distill.lr.x": 1})]), "distill.cfg_options.KEY"),
        (dict(cells=[dict(name="x", set={"distill.teacher": "{techer.student}"})]), "did you mean 'teacher.student'"),
        (dict(cells=[dict(name="x", set={"distill.teacher": "{finetune.classifier}"})]), "needs itself"),
        (dict(cells=[dict(name="x", set={"distill.verb": "distil"})]), "did you mean 'distill'"),
        (dict(cells=[dict(name="x", set={"distill.seed": 0, "finetune.seed": 0})]), "every seed of 'x'"),
        (dict(cells=[dict(name="x", paper={"finetune.top5": 1})]), "unknown score"),
        (dict(score="fintune.top1"), "did you mean 'finetune'"),
        (dict(paper=dict(tabel=7)), "did you mean 'table'"),
        (dict(paper=5), "paper is 5"),
        (dict(seeds=3), "seeds is 3"),
        (dict(seeds=["a"]), "0 is 'a'"),
        (dict(score=["finetune.top1"]), "it must be a text"),
        (dict(stages={"distill": "distill"}), "distill is 'distill'"),
        (dict(grid={"distill.lr": 0.1}), "it must be a list"),
        (dict(cells=["A"]), "0 is 'A'"),
        (dict(cells=[dict(name=7)]), "name is 7"),
        (dict(cells=[dict(name="x", set=["distill.lr"])]), "it must be a dict"),
        (dict(cells=[dict(name="x", paper="83.1")]), "a number, or a dict of them"),
        (dict(cells=[dict(name="x", paper={"finetune.top1": "83.1"})]), "finetune.top1 is '83.1'"),
    ],
)
def test_bad_studies(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        load_study(str(write(tmp_path, **change)))


def test_bad_commands(tmp_path, folders, capsys):
    path = write(tmp_path)
    for argv, words in (
        (["table07_relation"], "did you mean 'table07_relations'"),
        ([str(path)], "add --data FOLDER"),
        ([str(path), "--data", str(folders / "photos/train")], "no train and val"),
        ([str(path), "--data", str(folders / "photos"), "--only", "a-c"], "did you mean 'a-b'"),
        ([str(path), "--data", str(folders / "photos"), "--parallel", "0"], "--parallel 1"),
        ([str(path), "--data", str(folders / "photos"), "--seeds", "0", "-1"], "use e.g. --seeds 0 1 2"),
        ([str(tmp_path / "none.py")], "unknown study"),
    ):
        assert main(["study", *argv, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("cells = [1 +")
    with pytest.raises(TinyMIMError, match="cannot read"):
        load_study(str(tmp_path / "broken.py"))


def test_grid(tmp_path, folders):
    """Every combination is a cell, in capitals are constants."""
    study = load_study(
        str(
            write(
                tmp_path,
                cells=[],
                WIDTH=3,
                grid={"distill.lr": [0.1, 0.2], "distill.cfg_options.target_block": [1, 2, 3]},
            )
        )
    )
    assert len(study.cells) == 6
    assert study.cells[4].name == "lr=0.2, target_block=2"
    assert study.cells[4].stages["distill"]["cfg_options"] == {"target_block": 2}
    stages = open_stages(make_trials(study, study.cells, [0], find_data(str(folders / "photos"), None, None), tmp_path))
    assert len(stages) == 1 + 6 + 6


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0, 1) | st.integers(0, 9),
        "epochs": st.integers(1, 99),
        "targets": st.lists(st.text("abc", min_size=1), max_size=3),
        "max_steps": st.integers(0, 99) | st.booleans() | st.text("abc", min_size=1),
        "cfg_options": st.fixed_dictionaries({"mask_ratio": st.sampled_from([0.5, 0.6])}),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPTIONS, OPTIONS, st.integers(0, 9), st.integers(0, 9))
def test_a_stage_is_its_settings(folders, one, other, seed, another):
    """Same folder if and only if same settings, for a stage and for all that follow it; places do not count."""
    data = find_data(str(folders / "photos"), None, None)

    def folder(options, seed, **more):
        stages = {
            "teacher": dict(verb="pretrain", seed="{seed}", data="{photos}", **options, **more),
            "distill": dict(verb="distill", teacher="{teacher.student}"),
        }
        made = make_stages(stages, ["distill"], seed, data, Path("out"))
        assert list(made) == ["teacher", "distill"]
        assert made["distill"].needs == (made["teacher"],)
        return made["distill"].folder

    def typed(options):
        return json.dumps(options, sort_keys=True)

    assert (folder(one, seed) == folder(other, another)) is (typed(one) == typed(other) and seed == another)
    assert folder(one, seed, workers=7, device="cpu", save_every=None) == folder(one, seed)


DINOV2 = ("table06_features", "table07_relations", "table12_masking", "table13_drop_path")  # with a real teacher, too
OURS = [  # not row by row as in the paper
    "dmae_dinov2",
    "fast_distill",
    "segmentation_steps_dinov2",
    "small_data",
    "table08_09_strategies_dinov2",
    "table10_target_block_dinov2",
]
PAPER = {  # tables 5 to 13 of the paper, row by row
    "table05_class_token": [83.6, 80.6, 82.1],
    "table06_features": [83.6, 83.7, 84.2, 81.8, 84.1, 81.3, 84.3],
    "table07_relations": [84.4, 84.5, 84.4, 84.6],
    "table08_strategies": [72.2, 71.6, 70.6, 73.4, 75.8, 79.9, 80.6, 79.6, 80.8, 83.0, 81.2, 83.6, 82.6, 83.8, 85.0],
    "table09_segmentation": [47.2, 48.1, 46.2, 47.7, 52.2],
    "table10_target_block": [83.6, 84.1, 84.6, 84.8, 84.4],
    "table11_chain": [82.3, 82.1, 82.6, 74.1, 74.4, 75.0],
    "table12_masking": [84.6, 83.9, 84.0],
    "table13_drop_path": [84.3, 84.6, 84.3, 84.1, 83.9],
}


def test_every_table_has_both_forms():
    """But for table 9: small only."""
    full = [name for name in PAPER if name != "table09_segmentation"]
    others = [*(f"{name}_small" for name in PAPER), *(f"{name}_dinov2" for name in DINOV2)]
    assert study_names() == sorted([*full, *others, *OURS])
    assert all(path.read_text().startswith('"""') for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies(name, folders):
    """The paper's numbers, and command lines that the verbs and recipes accept."""
    study = load_study(name)
    rows = {"table08_strategies_small": slice(0, 5), "table11_chain_small": slice(3, 6)}
    if name not in OURS:
        numbers = [cell.paper["finetune.top1" if name.endswith("_dinov2") else study.scores[0]] for cell in study.cells]
        assert numbers == PAPER[name.removesuffix("_small").removesuffix("_dinov2")][rows.get(name, slice(None))]
    (folders / "weights.pth").touch()
    (folders / "store.json").touch()
    words = str(folders / "photos"), None, str(folders / "segments"), str(folders / "weights.pth"), str(folders)
    data = find_data(*words)
    for stage in open_stages(make_trials(study, study.cells, study.seeds[:1], data, Path("out"))):
        words = command(stage)
        if stage.verb == "segment":
            assert words[1:4] == ["-m", "tinymim", "segment"]
            assert (Path("mmseg_configs") / f"{words[4]}.py").is_file()
            assert words[5:7] == ["--work-dir", str(stage.run)]
        else:
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(f"tinymim.cli.{stage.verb}").add_arguments(parser)
            args = parser.parse_args(words[4:])
            assert load_recipe(args.recipe, args.cfg_options, stage.verb)


def test_general_photos_those_of_the_labelled_folder_and_both(folders):
    """The pattern of both names the photos of each once, wherever the study is called from."""
    data = find_data(str(folders / "photos"), None, str(folders / "segments"))
    counts = {
        word: len(list_photos(data[word].path, labels=True)) for word in ("photos", "segment_photos", "all_photos")
    }
    assert counts["all_photos"] == counts["photos"] + counts["segment_photos"] == data["all_photos"].content["files"]
    assert counts["segment_photos"] == len(list((folders / "segments" / "images" / "training").iterdir()))


def test_weights_of_the_teacher_enter_the_name_of_a_stage(folders, tmp_path, capsys):
    study, names = load_study("small_data"), set()
    for text in ("a", "b"):
        (tmp_path / "weights.pth").write_text(text)
        data = find_data(str(folders / "photos"), None, str(folders / "segments"), str(tmp_path / "weights.pth"))
        (trial,) = make_trials(study, study.cells[:1], [0], data, tmp_path)
        assert trial.stages["distill"].options["teacher_weights"] == str(tmp_path / "weights.pth")
        names.add(trial.stages["distill"].folder.name)
    assert len(names) == 2
    with pytest.raises(CheckpointError, match="no file at"):
        find_data(None, None, None, str(tmp_path / "none.pth"))
    argv = ["study", "small_data", "--data", str(folders / "photos"), "--seg-data", str(folders / "segments")]
    assert main([*argv, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "add --teacher-weights FILE" in capsys.readouterr().err


def test_a_store_enters_the_name_of_a_stage(folders, tmp_path):
    """By its header: in the study of fast distillation the teacher's own runs keep their names."""
    study, names = load_study("fast_distill"), []
    (tmp_path / "teacher.pth").write_text("a")
    for text in ("a", "b"):
        (tmp_path / "store.json").write_text(text)
        words = str(folders / "photos"), None, str(folders / "segments"), str(tmp_path / "teacher.pth"), str(tmp_path)
        trials = make_trials(study, study.cells, [0], find_data(*words), tmp_path)
        names.append([trial.stages["distill"].folder.name for trial in trials[:2]])
        assert trials[0].stages["distill"].options["store"] == str(tmp_path)
        assert "distill" not in trials[2].stages
        for trial in trials:
            [command(stage) for stage in trial.stages.values()]
    assert names[0][0] != names[1][0]
    assert names[0][1] == names[1][1]
    with pytest.raises(DataError, match="no target store"):
        find_data(None, None, None, None, str(tmp_path / "none"))


@pytest.mark.parametrize("form", ["", "_small"])
def test_the_default_cell_is_one_run(form, folders):
    """Tables 7, 10, 12 and 13 share their default; all small tables share the teacher."""
    data = find_data(str(folders / "photos"), None, str(folders / "segments"))
    last = {}
    for name, row in (
        ("table07_relations", 3),
        ("table10_target_block", 2),
        ("table12_masking", 0),
        ("table13_drop_path", 1),
    ):
        study = load_study(name + form)
        last[name] = make_trials(study, [study.cells[row]], [1], data, Path("out"))[0].stages["finetune"].folder
    assert len(set(last.values())) == 1
    small = [load_study(f"{name}_small") for name in PAPER]
    pretrained = {
        stage.folder
        for study in small
        for stage in open_stages(make_trials(study, study.cells, [0, 1], data, Path("out")))
        if stage.options.get("seed") == 0 and stage.verb == "pretrain"
    }
    assert len(pretrained) == 3  # the teacher, the MAE of the student's size with seed 0, table 11's MAE-S


def test_cells_do_what_their_names_say():
    """The settings behind the rows of the paper's tables, full and small."""
    for form in ("", "_small"):
        for cell in load_study(f"table07_relations{form}").cells:
            options = cell.stages["distill"]
            assert options["targets"] == (["qq+kk+vv"] if "QQ" in cell.name else ["qk+vv"])
            assert options["cfg_options"]["softmax"] is ("no softmax" not in cell.name)
        for cell in load_study(f"table13_drop_path{form}").cells:
            options = cell.stages["distill"]["cfg_options"]
            assert cell.name == f"teacher {options['teacher_drop_path']}, student {options['drop_path']}"
        for cell in load_study(f"table10_target_block{form}").cells:
            assert cell.name.startswith(f"block {cell.stages['distill']['cfg_options']['target_block']}")
        words = {
            "output": "output",
            "FFN, before": "ffn_pre",
            "FFN, after": "ffn_post",
            "Q, K, V": "qkv",
            "attention, before": "attn_pre",
            "attention, after": "attn_post",
        }
        for cell in load_study(f"table06_features{form}").cells[1:]:
            assert cell.stages["distill"]["targets"] == [next(v for k, v in words.items() if cell.name.startswith(k))]
        for cell in load_study(f"table12_masking{form}").cells:
            options = cell.stages["distill"]["cfg_options"]
            assert options.get("mask") == ("both" if "masked" in cell.name else None)
            assert bool(options["reconstruct"]) is ("reconstruction" in cell.name)
    for name in ("table08_strategies", "table08_strategies_small", "table09_segmentation_small"):
        for cell in load_study(name).cells:
            last = cell.stages["segment" if "09" in name else "finetune"].get("student")
            strategy = cell.name.rpartition(": ")[2]
            assert last == {"scratch": None, "MAE": "{mae.student}"}.get(strategy, "{distill.student}")
            if strategy in ("class token", "feature", "relation"):
                word = {"class token": "class_token", "feature": "qkv", "relation": "qk+vv"}[strategy]
                behind = "@11" * (strategy == "class token" and cell.name.startswith(("tiny", "small")))
                assert cell.stages["distill"]["targets"] == [word + behind]


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm(values):
    """The definition: sorted p times how many are left, never falling, at most 1."""
    found = [pair["p_holm"] for pair in holm([{"p": p} for p in values])]
    assert [p is None for p in found] == [p is None for p in values]
    known = sorted(p for p in values if p is not None)
    for p, adjusted in zip(values, found, strict=True):
        if p is not None:
            before = known[: len(known) - known[::-1].index(p)]
            assert adjusted == pytest.approx(min(1, max((len(known) - i) * q for i, q in enumerate(before))))


SCORES = st.lists(st.integers(0, 1000), min_size=2, max_size=6).map(lambda v: {i: x / 1000 for i, x in enumerate(v)})


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES)
def test_compare_is_the_t_test(a, b):
    """Paired where the seeds agree, else Welch's; scipy's own tests give the same p."""
    found = compare(a, b)
    paired = a.keys() == b.keys()
    assert found["test"] == ("paired" if paired else "Welch")
    assert found["difference"] == pytest.approx(statistics.fmean(a.values()) - statistics.fmean(b.values()), abs=1e-12)
    if found["t"] is None:
        assert found["verdict"] == "no spread, no statement"
        apart = [a[k] - b[k] for k in a] if paired else []
        assert (np.ptp(apart) if paired else np.ptp([*a.values()]) + np.ptp([*b.values()])) < 1e-9
        return
    x, y = [*a.values()], [*b.values()]
    test = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    assert found["t"] == pytest.approx(test.statistic, rel=1e-6)
    assert found["verdict"] == (
        "within noise" if found["p"] >= 0.05 else "reproduced" if found["t"] > 0 else "reversed"
    )


def test_verdicts():
    a, b = {0: 0.60, 1: 0.62, 2: 0.61}, {0: 0.50, 1: 0.521, 2: 0.512}
    assert compare(a, b)["verdict"] == "reproduced"
    assert compare(b, a)["verdict"] == "reversed"
    assert compare(a, {0: 0.55, 1: 0.70, 2: 0.58})["verdict"] == "within noise"
    assert compare(a, {0: 0.3})["verdict"] == "one seed, no statement"
    assert compare(a, {})["verdict"] == "not run"
    assert compare(a, a)["verdict"] == "no spread, no statement"


def test_table_shows_what_is_there(fake, folders):
    """Numbers in percent beside the paper's; ties have no order; plots are XML, one dot per seed; holes stay holes."""
    path = write(fake, seeds=[0, 1], also=["distill.top1"])
    assert run(path, folders, "--only", "c", "A + B") == 0
    text = (fake / "out/mine/table.md").read_text()
    assert "| A + B | 84 | 60.50 \u00b1 0.71 | 60.00 | 61.00 | 2 |" in text
    assert "| D, plain | 83 | not run |  |  | 0 |  |" in text
    assert "table 7" in text
    values = table(path)
    assert [(p["better"], p["worse"]) for p in values["pairs"]] == [("A + B", "C"), ("A + B", "D, plain")]
    assert [p["verdict"] for p in values["pairs"]] == ["no spread, no statement", "not run"]
    assert "Of all 2 pairs" in text
    assert len(values["files"]) == 4
    assert "tinymim study" in values["command"]
    svg = ET.parse(fake / "out/mine/finetune.top1.svg")
    circles = [e for e in svg.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 + 4
    assert all(0 <= float(c.get("cx")) <= 820 and math.isfinite(float(c.get("cy"))) for c in circles)
    assert [e.text for e in svg.iter() if e.tag.endswith("text")].count("not run") == 1
    page = (fake / "out/mine/report.html").read_text()
    assert "not run" in page
    assert str(fake) not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill.lrr": 1e-3}, "unknown option of distill: 'lrr'"),
        ({"distill.cfg_options.drop_paht": 0.1}, "did you mean 'drop_path'"),
        ({"distill.cfg_options.drop_path": 2}, "drop_path=2"),
        ({"distill.recipe": "mae_tiny"}, "tinymim pretrain runs such recipes"),
        ({"distill.cfg_options.student_args.dpeth": 2}, "did you mean 'student_args.depth'"),
        ({"distill.cfg_options.student_args.depth": "two"}, "student_args.depth='two'"),
        ({"distill.cfg_options.teachers": [dict(teacher="x.pth")]}, "an option cannot hold a dict in a list"),
        ({"distill.lr": "fast"}, "lr='fast' of a distill stage"),
        ({"distill.batch_size": "two"}, "it must be a whole number"),
    ],
)
def test_what_a_verb_would_refuse_is_said_first(tmp_path, folders, capsys, change, words):
    """In the dry run too, before any stage has run."""
    stages = {"distill": dict(verb="distill", teacher="x.pth", data="{photos}", seed="{seed}")}
    path = write(tmp_path, stages=stages, score="distill.loss", paper={}, cells=[dict(name="a", set=change)])
    (tmp_path / "x.pth").touch()
    for more in (["--dry-run"], []):
        assert run(path, folders, *more) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out/stages/*"))


def test_unknown_score(tmp_path, folders, capsys):
    assert run(write(tmp_path, score="finetune.top11", paper={}), folders) == 2
    assert "did you mean 'top1'" in capsys.readouterr().err


def test_slugs():
    assert slug("QK + VV, softmax") == "qk-vv-softmax"
    assert slug("teacher 0.1, student 0.2") == "teacher-0.1-student-0.2"


@pytest.mark.slow
def test_real_study(folders, tmp_path):
    """An MAE and a distillation from it; a stage that ended unseen is resumed to the same numbers."""
    common = dict(data="{photos}", img_size=32, batch_size=8, epochs=1, workers=0, device="cpu")
    tiny = {"student_args": dict(depth=2, embed_dim=24, num_heads=2)}
    path = write(
        tmp_path,
        score="distill.loss",
        paper={},
        seeds=[0],
        cells=[dict(name="qk", set={"distill.targets": ["qk"]})],
        stages={
            "teacher": dict(
                verb="pretrain",
                recipe="mae_tiny",
                seed=0,
                **common,
                cfg_options=tiny | {"decoder": dict(dim=16, depth=1, heads=2)},
            ),
            "distill": dict(
                verb="distill",
                teacher="{teacher.student}",
                seed="{seed}",
                **common,
                cfg_options=tiny | {"crop_scale": (0.5, 1.0)},
            ),
        },
    )
    assert run(path, folders) == 0
    result_path = tmp_path / "out/mine/cells/qk/seed0.json"
    result = json.loads(result_path.read_text())
    (metrics,) = tmp_path.glob("out/stages/distill-*/run/metrics.jsonl")
    logged = [record for record in map(json.loads, metrics.read_text().splitlines()) if "loss" in record]
    assert result["scores"]["distill.loss"] == logged[-1]["loss"]
    assert set(logged[-1]) >= {"qk", "loss"}
    assert "vv" not in logged[-1]
    assert result["data"]["photos"]["files"] == 16
    (metrics.parents[1] / "done.json").unlink()  # ended, but the study was killed before it could say so
    result_path.unlink()
    assert run(path, folders) == 0
    assert "resuming at step 2" in (metrics.parents[1] / "log.txt").read_text()
    assert json.loads(result_path.read_text())["scores"] == result["scores"]


def test_a_segmentor_teaches_another_stage():
    """Its file is read; the folder follows from the teacher's stage and from the weights, defaults included."""
    big = dict(verb="segment", config="segformer_b0_camvid", cfg_options={"randomness.seed": "{seed}"})
    taught = dict(verb="segment", config="upernet_tinymim_demo", teacher_segmentor="{big.segmentor}")

    def made(**more):
        stages = {"big": big | more.pop("big", {}), "seg": taught | more}
        return make_stages(stages, ["seg"], 0, {}, Path("out"))

    found = made()
    assert command(found["seg"])[-2:] == ["--teacher-segmentor", str(found["big"].run / "segmentor.pth")]
    assert found["seg"].needs == (found["big"],)
    folder = found["seg"].folder
    assert made(cfg_options={"teacher.kl": 1.0, "teacher.temperature": 1.0})["seg"].folder == folder  # the defaults
    assert made(cfg_options={"teacher.channel": 3.0})["seg"].folder != folder
    assert made(big={"cfg_options": {"randomness.seed": 5}})["seg"].folder != folder
    assert made(teacher_segmentor=None)["seg"].folder != folder
    for wrong in ("{big.student}", "{bgi.segmentor}"):
        with pytest.raises(ConfigError, match=r"big\.segmentor"):
            made(teacher_segmentor=wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cfg_options": {"train_cfg.max_itres": 2}}, "did you mean 'train_cfg.max_iters'"),
        ({"teacher_segmentor": "x.pth", "cfg_options": {"teacher.lk": 2}}, "did you mean 'teacher.kl'"),
        ({"teacher_segmentor": "x.pth", "cfg_options": {"teacher.kl": 0.0}}, "would teach nothing"),
        ({"cfg_options": {"train_dataloader.batch_size": "two"}}, "train_dataloader.batch_size='two'"),
        ({"cfg_options": {"randomness.sede": "{seed}"}}, "did you mean 'randomness.seed'"),
        ({"cfg_options": {"param_scheduler": [dict(type="PolyLR")]}}, "an option cannot hold a dict in a list"),
        ({"student_": "x.pth"}, "did you mean 'student'"),
        ({"work_dir": "x"}, "unknown option of segment: 'work_dir'"),
    ],
)
def test_a_stage_of_segmentation_is_checked_first(tmp_path, folders, options, words):
    stage = dict(verb="segment", config="upernet_tinymim_demo", ignore_label="{seed}") | options
    path = write(tmp_path, stages={"seg": stage}, score="seg.mIoU", paper={}, cells=[dict(name="a")])

    def words_of_the_stage():
        study = load_study(str(path))
        (trial,) = make_trials(study, study.cells, [0], {}, tmp_path)
        return command(trial.stages["seg"])

    with pytest.raises(ConfigError, match=words):
        words_of_the_stage()
