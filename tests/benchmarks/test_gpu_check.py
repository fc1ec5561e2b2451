"""tools/gpu_check.py: parts survive each other, its files are written, and every part runs as far as a CPU goes."""

import json
import os
import subprocess
import sys

import pytest

from tinymim.benchmarks import gpu_check, gpu_parts


def check(tmp_path, *parts, code=0):
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert gpu_check.main([*options, *(["--parts", *parts] if parts else [])]) == code
    (file,) = tmp_path.glob("gpu_check_*.json")
    results = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == gpu_check.table(results)
    return results["parts"]


@pytest.mark.slow
def test_parts_survive_the_failure_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.PARTS, "golden", (gpu_parts.golden, 0.2))
    parts = check(tmp_path, "golden", "cuda_provider", "tests", code=1)
    assert {name: part["verdict"] for name, part in parts.items()} == {
        "golden": "failed",
        "cuda_provider": "not possible",
        "tests": "ok",
    }
    assert parts["golden"]["why"] == "stopped after 0 s"
    assert "needs a GPU" in parts["cuda_provider"]["why"]
    assert "next: python tools/gpu_check.py --parts golden" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check.sys, "executable", "/bin/false")
    assert gpu_check.run_part("golden", "cpu", True, tmp_path, "", 20)["why"] == "ended with 1"


@pytest.mark.slow
def test_a_bare_machine(tmp_path):
    """Started where our packages are not installed (-S), with ``--out`` relative to where it was typed."""
    tool = gpu_check.ROOT / "tools" / "gpu_check.py"
    words = ["--device", "cpu", "--quick", "--parts", "cuda_provider", "--out", "made"]
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", str(tool), *words]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs a GPU" in done.stdout
    assert len(list(tmp_path.glob("made/gpu_check_*.md"))) == 1


def test_late_parts_are_left_out(tmp_path):
    assert gpu_check.run_part("golden", "cpu", True, tmp_path, "", 5)["verdict"] == "left out"


def test_the_losses_agree_at_a_part_s_sizes(tmp_path):
    machine = gpu_parts.Machine("cpu", True, tmp_path)
    figures = gpu_parts.kernel(machine)
    assert set(figures) == {"17 tokens float32", "17 tokens bfloat16"}
    assert all(row["loss"] < row["tolerance"] and row["ours ms"] > 0 for row in figures.values())


def test_wheels_that_are_missing_are_said(tmp_path, capsys):
    assert gpu_check.main(["--wheels", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "--prepare" in capsys.readouterr().err


def test_a_wheel_of_one_python_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "WHEELS", [])
    (tmp_path / "a-1-cp311-cp311-manylinux_2_17_x86_64.whl").touch()
    assert gpu_check.main(["--prepare", str(tmp_path)]) == 2
    assert "for one Python only" in capsys.readouterr().err
    (tmp_path / "a-1-cp311-cp311-manylinux_2_17_x86_64.whl").unlink()
    (tmp_path / "a-1-py3-none-any.whl").touch()
    assert gpu_check.main(["--prepare", str(tmp_path)]) == 0
    assert f"next: python3 tools/gpu_check.py --wheels {tmp_path}" in capsys.readouterr().out


@pytest.mark.slow
def test_every_part_runs_here(tmp_path):
    parts = check(tmp_path)
    assert set(parts) == set(gpu_check.PARTS)
    assert {part["verdict"] for part in parts.values()} <= {"ok", "not possible"}, parts
    assert [name for name, part in parts.items() if part["verdict"] != "ok"] == ["sync_bn", "cuda_provider"]
