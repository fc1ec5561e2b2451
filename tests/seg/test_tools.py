"""``tinymim segment`` and its older names as a user calls them; two processes; MMSegmentation's own trainer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinymim.cli import main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import test_seg  # noqa: E402
import train_seg  # noqa: E402


def typed(options):
    """--cfg-options as typed."""
    return [f"{key}={str(value).replace(' ', '')}" for key, value in options.items()]


def run(*command, cwd=ROOT, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=env, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_train_then_test(scenes, small, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["upernet_tinymim_demo", "--data-root", str(scenes), "--work-dir", str(folder), "--cfg-options"]
    assert train_seg.main([*arguments, *typed(small(**{"train_cfg.max_iters": 2}))]) == 0
    out = capsys.readouterr().out
    assert f"next:    tinymim segment --test {folder}/segmentor.pth --data-root {scenes}" in out
    assert (folder / "report.html").is_file()
    result = tmp_path / "result.json"
    assert test_seg.main([str(folder / "segmentor.pth"), "--json", str(result)]) == 0
    assert "next:    tinymim-export" in capsys.readouterr().out
    assert json.loads(result.read_text())["mIoU"] == json.loads((folder / "result.json").read_text())["mIoU"]


@pytest.mark.slow
def test_the_verb_trains_and_tests_like_the_tools(scenes, small, tmp_path, capsys):
    """The same files, scores and next lines, whatever name was typed."""
    arguments = ["upernet_tinymim_demo", "--data-root", str(scenes)]
    options = ["--cfg-options", *typed(small(**{"train_cfg.max_iters": 2}))]
    said, scores = [], []
    for name, train in (("verb", lambda words: main(["segment", *words])), ("tool", train_seg.main)):
        folder = tmp_path / name
        assert train([*arguments, "--work-dir", str(folder), *options]) == 0
        said.append(capsys.readouterr().out.replace(str(folder), "FOLDER"))
        scores.append(json.loads((folder / "result.json").read_text())["confusion"])
    next_lines = [[line for line in text.splitlines() if line.startswith("next:")] for text in said]
    assert next_lines[0] == next_lines[1]
    assert next_lines[0] == [
        f"next:    tinymim segment --test FOLDER/segmentor.pth --data-root {scenes} --tta",
        "next:    tinymim-export --onnx FOLDER/segmentor.onnx --checkpoint FOLDER/segmentor.pth",
    ]
    assert scores[0] == scores[1]
    file, table = tmp_path / "result.json", tmp_path / "result.md"
    segmentor = str(tmp_path / "verb" / "segmentor.pth")
    assert main(["segment", "--test", segmentor, "--json", str(file), "--markdown", str(table)]) == 0
    assert json.loads(file.read_text())["confusion"] == scores[0]
    assert "| class | IoU % |" in table.read_text()
    config = str(tmp_path / "verb" / "config.py")
    assert main(["segment", "--test", config, segmentor, "--data-root", str(scenes)]) == 0
    assert f"--checkpoint {segmentor} --config {config}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["demo", "--tta"], "--tta without --test", "add --test"),
        (["demo", "x.pth"], "CHECKPOINT without --test", "add --test"),
        (["--test", "demo", "x.pth", "--student", "y.pth"], "--student and --test", "leave out --student or --test"),
        (["--test", "demo", "x.pth", "--dry-run"], "--dry-run and --test", "leave out --dry-run"),
        (["x.pth"], "x.pth is a checkpoint", "add --test"),
        (["--test", "demo.py"], "no checkpoint", "tinymim segment"),
        (["--test", "upernet_tinymim_demo"], "no checkpoint", "segmentor.pth"),
        (["--test"], "no checkpoint", "segmentor.pth"),
        (["--test", "x.pth", "upernet_tinymim_demo"], "no checkpoint", "segmentor.pth"),
        (["--test", "x.onnx"], "x.onnx is an exported file", "tinymim eval x.onnx"),
        ([], "no config", "tinymim segment upernet"),
    ],
)
def test_the_verb_refuses_what_does_not_go_together(words, message, fix, capsys):
    assert main(["segment", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tinymim segment: error: {message}")
    assert fix in error.split("\n  fix: ")[1]


def test_dry_run(scenes, small, tmp_path, capsys, monkeypatch):
    """Memory, time and FLOP of the run, counted on its own model; nothing is written."""
    from tinymim.seg import estimate_segmentor

    monkeypatch.chdir(tmp_path)
    arguments = ["upernet_tinymim_demo", "--data-root", str(scenes), "--dry-run", "--cfg-options"]
    assert train_seg.main([*arguments, *typed(small(**{"train_cfg.max_iters": 2}))]) == 0
    said = capsys.readouterr().out
    assert "2 steps of" in said
    assert "M trained parameters" in said
    assert not list(tmp_path.iterdir())
    few, many = (
        estimate_segmentor(
            "upernet_tinymim_demo",
            data_root=scenes,
            cfg_options=small(**{"train_cfg.max_iters": steps, "train_dataloader.batch_size": batch}),
        )
        for steps, batch in ((2, 2), (4, 4))
    )
    assert few.flop_per_crop == many.flop_per_crop > 1e6
    assert few.bytes_per_crop == many.bytes_per_crop
    assert many.gib - few.gib == pytest.approx(2 * 1.5 * few.bytes_per_crop / 2**30)
    assert f"{few.flop_per_crop * 4 / 1e18:.3g} EFLOP" in str(few)


def test_a_dry_run_measures_the_crop_and_the_student(scenes, small, tmp_path):
    """Crops larger than the preprocessor's size are not padded; a hierarchical student decides its backbone."""
    from tinymim.models import create_model, save_student
    from tinymim.seg import estimate_segmentor

    crop = {"train_dataloader.dataset.pipeline.3.crop_size": (96, 32), "train_dataloader.batch_size": 2}
    cost = estimate_segmentor("upernet_tinymim_demo", data_root=scenes, cfg_options=small(**crop))
    assert cost.size == (96, 64)
    shape = dict(embed_dims=(16, 32, 64, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    save_student(create_model("tiny_vit_5m_224", img_size=64, **shape), tmp_path / "student.pth")
    own = {**crop, "model.data_preprocessor.size": (64, 64), "model.decode_head.channels": 16}
    own |= {"model.auxiliary_head.channels": 16}
    name = "upernet_tinyvit_5m_light_camvid"
    cost = estimate_segmentor(name, data_root=scenes, student=tmp_path / "student.pth", cfg_options=own)
    assert cost.size == (96, 64)
    assert cost.parameters < 500_000


def test_bad_input_exits_2_with_three_parts(scenes, small, tmp_path, capsys):
    assert train_seg.main(["upernet_tinymim_demo", "--data-root", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_seg.py: error: there is no folder")
    assert "\n  why: " in error
    assert "\n  fix: " in error
    assert train_seg.main(["upernet_tinymim_xxl"]) == 2
    assert test_seg.main([str(ROOT / "mmseg_configs" / "upernet_tinymim_demo.py")]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_on_the_cpu_count_and_score_as_one(scenes, small, tmp_path):
    """torchrun with gloo: 2 x batch 2, five validation photos, each counted once; a resume changes nothing."""
    options = typed(small(**{"train_cfg.max_iters": 4}))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = ["tools/train_seg.py", "upernet_tinymim_demo", "--data-root", scenes, "--work-dir", tmp_path / "run"]
    code, out, err = run(*command, *train, "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert "2 process(es) x batch 2 = 4 photos per step" in out
    assert out.count("mIoU") == 2  # from one process: at the validation and at the end
    before = json.loads((tmp_path / "run" / "result.json").read_text())
    assert before["images"] == 5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints" / "iter_4.pth").unlink()
    code, out, err = run(*command, *train, "--resume", "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert test_seg.main([str(tmp_path / "run" / "segmentor.pth"), "--json", str(tmp_path / "one.json")]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["confusion"] == before["confusion"]


@pytest.mark.slow
def test_the_verb_works_from_an_installed_package(scenes, small, tmp_path):
    """``pip install .`` without the repository around it: the config by its name, the report, the next lines."""
    source, box = tmp_path / "source", tmp_path / "box"
    for name in ("tinymim", "export", "mmseg_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", box, source]
    code, _, err = run(*pip)
    assert code == 0, err
    options = typed(small(**{"train_cfg.max_iters": 2}))
    command = ["-m", "tinymim", "segment", "upernet_tinymim_demo", "--data-root", scenes, "--cfg-options", *options]
    code, out, err = run(*command, cwd=tmp_path, PYTHONPATH=str(box))
    assert code == 0, err[-3000:]
    folder = tmp_path / "runs" / "upernet_tinymim_demo"
    assert (folder / "report.html").is_file()
    (test,) = (line.split()[1:] for line in out.splitlines() if line.startswith("next:    tinymim segment"))
    code, out, err = run("-m", *test[:-1], cwd=tmp_path, PYTHONPATH=str(box))
    assert code == 0, err[-3000:]
    assert "5 photos" in out


@pytest.mark.slow
def test_mmsegs_own_trainer_takes_our_configs(scenes, small, tmp_path):
    """What `mim train mmsegmentation CONFIG` runs."""
    import mmseg

    tool = Path(mmseg.__file__).parent / ".mim" / "tools" / "train.py"
    config = ROOT / "mmseg_configs" / "upernet_tinymim_demo.py"
    data = {f"{split}_dataloader.dataset.data_root": scenes for split in ("train", "val", "test")}
    options = typed(
        small(
            **{
                "train_cfg.max_iters": 2,
                "train_dataloader.persistent_workers": False,
                "val_dataloader.persistent_workers": False,
                **data,
            }
        )
    )
    code, out, err = run(tool, config, "--work-dir", tmp_path / "run", "--cfg-options", *options)
    assert code == 0, err[-3000:]
    assert (tmp_path / "run" / "segmentor.pth").is_file()
    assert "from scratch" in out
    code, out, err = run(
        tool, config, "--work-dir", tmp_path / "b", "--cfg-options", *options, "model.decode_head.num_classes=5"
    )
    assert code != 0
    assert "model.decode_head.num_classes=12" in err
    code, out, err = run(
        tool.with_name("test.py"),
        config,
        tmp_path / "run" / "segmentor.pth",
        "--work-dir",
        tmp_path / "test",
        "--tta",
        "--cfg-options",
        *options,
    )
    assert code == 0, err[-3000:]
    assert "5 photos" in out
