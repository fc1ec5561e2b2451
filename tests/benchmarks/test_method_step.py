"""``tools/bench_methods.py``: the commands' own steps in turns, a table, bad input."""

import json

import pytest

from tinymim.benchmarks import method_step


@pytest.mark.slow
def test_two_methods(tmp_path, capsys):
    """Each has a time and a memory; the second a ratio to the first."""
    words = [
        "--size",
        "32",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    assert method_step.main([*words, "--methods", "MAE", "D2-MAE", "--out", str(tmp_path / "steps")]) == 0
    rows = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["MAE", "D2-MAE"]
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert "times" in rows[1]
    assert "next: python tools/bench_distill.py --pair 'T<-B' --size 32" in capsys.readouterr().out
    assert "| D2-MAE |" in (tmp_path / "steps.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_fast_distillation_from_a_store_and_beside_the_teacher(tmp_path):
    """The teacher's forward pass is what the store saves."""
    names = ["fast distillation", "fast distillation, from a store"]
    words = ["--size", "32", "--batch", "2", "--rounds", "2", "--seconds", "0", "--device", "cpu"]
    assert method_step.main([*words, "--precision", "fp32", "--methods", *names, "--out", str(tmp_path / "steps")]) == 0
    rows = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == names
    assert rows[1]["peak_mib"] < rows[0]["peak_mib"] - 200  # ViT-B's weights
    assert rows[1]["ms"] < rows[0]["ms"]


@pytest.mark.parametrize("words", [["--size", "40"], ["--rounds", "0"], ["--batch", "0"]])
def test_bad_input(words, capsys, tmp_path):
    assert method_step.main([*words, "--out", str(tmp_path / "steps")]) == 2
    assert "fix:" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
