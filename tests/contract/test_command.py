"""``tinymim contract`` on photos: a short training scores, what it writes is used by other commands, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim.cli import main as tinymim
from tinymim.engine import load_recipe
from tinymim.models import ViT, create_model, model_from_checkpoint, read_checkpoint, save_student
from tinymim.models.classifier import Classifier, load_classifier, save_classifier

DECODER = ["--cfg-options", "decoder.dim=16", "decoder.depth=1", "decoder.heads=2"]
JOB = ["--steps", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path):
    """Four photos in each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "a start.pth"
    save_student(ViT(img_size=32, embed_dim=48, depth=2, num_heads=3), file)
    return file


def run(capsys, *words, code=0):
    got = tinymim(["contract", *map(str, words)])
    said = capsys.readouterr()
    assert got == code, said.err
    return said.out if code == 0 else said.err


@pytest.mark.slow
def test_a_search_with_a_short_training(photos, start, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["--from", start, "--params", "60k", "--recipe", "mae_tiny", "--data", photos, "--val-data", photos, *JOB]
    planned = run(capsys, *words, "--dry-run", *DECODER)
    assert "limits: 0.06 M parameters" in planned
    assert "minutes in all" in planned
    assert not out.exists()
    said = run(capsys, *words, "--out", out, *DECODER)
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text("utf-8").splitlines()]
    model, file = model_from_checkpoint(out / "student.pth", say=False)
    assert sum(p.numel() for p in model.parameters()) <= 60_000 < rows[0]["params"]
    assert all(row["score"] < 0 for row in rows)
    assert len({row["score"] for row in rows}) == len(rows)
    recipe = load_recipe(str(out / "recipe.py"))
    wanted = {key: file.config[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    assert wanted.items() <= dict(recipe.student_args).items()
    assert recipe.method == "mae"
    assert said.count("next:    tinymim") == 3
    assert f"--init-from {out}/student.pth" in said
    page = (out / "report.html").read_text("utf-8")
    assert "million parameters" in page
    assert "minus held-out loss" in page
    # trained, not only cut; and the trained weights are those that the next step was cut from
    assert "epoch" in (out / "candidates/00-start/log.txt").read_text("utf-8")
    trained = read_checkpoint(out / "candidates/00-start/student.pth").state
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], read_checkpoint(start).state["blocks.0.mlp.fc1.weight"])
    monkeypatch.setattr("tinymim.contract.score.RecipeScore.__call__", None)  # nothing is left to score
    run(capsys, *words, "--out", out, *DECODER)
    changed = run(capsys, *words[:-6], *JOB[:1], "2", *JOB[2:], "--out", out, *DECODER, code=2)
    assert "holds another search" in changed


@pytest.mark.slow
def test_parallel_and_killed_is_the_search_of_one_process(photos, start, tmp_path):
    """Two at a time, killed without warning within a step: the same candidates, scores and files in the same order."""
    words = ["--from", start, "--params", "60k", "--recipe", "mae_tiny", "--data", photos, *JOB]

    def begin(out, *more):
        command = [sys.executable, "-m", "tinymim", "contract", *words, "--out", out, *more, *DECODER]
        return subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"})

    def lines(out):
        file = out / "candidates.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert begin(tmp_path / "one").wait(600) == 0
    out = tmp_path / "two"
    stopped = begin(out, "--parallel", "2")
    while not any((out / "candidates").glob("01-*/run/config.py")):  # some are being scored
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    found = lines(out)
    assert 1 <= len(found) < len(lines(tmp_path / "one"))
    assert begin(out, "--parallel", "2").wait(600) == 0
    assert lines(out) == lines(tmp_path / "one")
    assert (out / "student.pth").read_bytes() == (tmp_path / "one/student.pth").read_bytes()


@pytest.mark.slow
def test_tiny_vit_from_a_store(photos, tmp_path, capsys):
    """The head is the store's, is cut with the rest, and goes on from step to step."""
    torch.manual_seed(0)
    shape = dict(embed_dims=[32, 32, 64, 64], depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2])
    teacher = Classifier(create_model("tiny_vit_5m_224", img_size=32, **shape), 2)
    save_classifier(teacher, tmp_path / "teacher.pth", ["cats", "dogs"])
    store = tmp_path / "store"
    cached = ["cache", "--teacher", tmp_path / "teacher.pth", "--data", photos, "--img-size", 32, "--epochs", 2]
    cached += ["--topk", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--out", store]
    assert tinymim([*map(str, cached)]) == 0
    words = ["--from", tmp_path / "teacher.pth", "--params", "180k", "--store", store, "--data", photos, *JOB]
    out = tmp_path / "out"
    said = run(capsys, *words, "--out", out)
    assert "tinymim distill --recipe" in said
    model, file = load_classifier(out / "student.pth")
    assert file.meta["classes"] == ["cats", "dogs"]
    assert model.num_classes == 2
    assert "has no head" not in "".join(p.read_text("utf-8") for p in out.glob("candidates/*/log.txt"))
    train = next(line.split("next:    tinymim ")[1] for line in said.splitlines() if "next:    tinymim distill" in line)
    assert tinymim([*train.split(), *JOB[2:], "--max-steps", "1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_latency_of_the_exported_file(photos, start, tmp_path, capsys, precision):
    out = tmp_path / "out"
    words = ["--from", start, "--params", "60k", "--latency", "1s", "--seconds", "0.1", "--precision", precision]
    run(capsys, *words, "--recipe", "mae_tiny", "--data", photos, *JOB, "--out", out, *DECODER)
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text("utf-8").splitlines()]
    assert all(0 < row["latency_ms"] < 1000 for row in rows)
    assert "and ms" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--from is missing"),
        (["--from", "START"], "no limits"),
        (["--from", "START", "--params", "5.4X"], "--params 5.4X"),
        (["--from", "START", "--params", "5G"], "nothing to do"),
        (["--from", "START", "--params", "10"], "no model of this kind"),
        (["--from", "START", "--params", "60k"], "no photos"),
        (["--from", "START", "--params", "60k", "--steps", "0"], "--steps 0"),
        (["--from", "START", "--params", "60k", "--weights", "START"], "a file has its own weights"),
        (["--from", "START", "--latency", "9ms", "--precision", "bf16"], "only OpenVINO"),
        (["--from", "START", "--latency", "9ms", "--precision", "int8"], "int8 without photos"),
        (["--from", "START", "--params", "60k", "--store", "s", "--teacher", "t"], "the store is the teacher"),
        (["--from", "START", "--params", "60k", "--recipe", "mae_tiny", "--teacher", "t"], "no such option"),
        (["--from", "hiera_tiny_224", "--params", "5M"], "cannot be contracted"),
        (["--from", "no such.pth", "--params", "5M"], "no such.pth"),
    ],
)
def test_refusals(start, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    said = run(capsys, *(str(start) if word == "START" else word for word in words), code=2)
    assert message in said
    assert "fix:" in said
    assert not (tmp_path / "runs").exists()
