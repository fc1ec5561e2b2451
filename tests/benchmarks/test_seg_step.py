"""The benchmark of segmentation on a model of a few pixels: every part runs, and both contenders agree."""

import argparse

import pytest

from tinymim.benchmarks import seg_step
from tinymim.schema import parse


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(seg_step, "PHOTOS", {"64x80 -> 96x120": ((64, 80), (96, 120))})
    return ["--config", "upernet_tinymim_demo", "--size", "64", "--rounds", "1", "--out", str(tmp_path / "made")]


@pytest.mark.slow
def test_every_part(small, tmp_path, capsys):
    assert seg_step.main([*small, "--profile", "--parts", "train", "predict"]) == 0
    page = (tmp_path / "made.md").read_text()
    assert page in capsys.readouterr().out
    for words in ("| ours, bf16 (--amp) |", "| 64x80 -> 96x120 |", "convolutions", "not measured"):
        assert words in page
    found = parse((tmp_path / "made.json").read_text(), dict, "made.json")
    assert all(row["images_per_s"] > 0 for row in found["train"].values())
    row = found["predict"]["64x80 -> 96x120"]
    assert row["other_pixels"] < row["pixels"] / 1000


@pytest.mark.slow
def test_memory_of_a_step(small, tmp_path):
    assert seg_step.main([*small, "--parts", "memory"]) == 0
    found = parse((tmp_path / "made.json").read_text(), dict, "made.json")
    assert set(found["memory"]) == set(seg_step.CONTENDERS)
    assert min(found["memory"].values()) > 100


def test_contenders_have_one_loss():
    args = argparse.Namespace(config="upernet_tinymim_demo", size=64, device="cpu")
    losses = []
    for tiled in (False, True):
        cfg, model, kind = seg_step.build(args)
        step = seg_step.Step(cfg, model, kind, 2, tiled=tiled, half=False)
        assert (step.patched[model.decode_head] is not None) is tiled
        losses.append([step() for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
