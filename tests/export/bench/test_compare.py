"""Bench on several runtimes, what its intervals say, and the comparison of stored results of one machine."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.export.tiny import write_segmentor
from tinymim import cli
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim_export import bench
from tinymim_export.bench.compare import compare_benches, machine_differences
from tinymim_export.bench.latency import BenchResult, bench_row, settings_of, speed_words
from tinymim_export.runtime.engines import open_engine


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp("bench") / "tiny.onnx")


def test_one_file_on_two_runtimes_in_one_process(file, tmp_path, capsys):
    pytest.importorskip("openvino")
    options = ["--runtime", "onnxruntime", "--runtime", "openvino", "--runs", "10", "--threads", "1"]
    assert cli.main(["bench", str(file), *options, "--json", str(tmp_path / "a.json")]) == 0
    value = json.loads((tmp_path / "a.json").read_text())
    assert [row["engine"] for row in value["rows"]] == ["onnxruntime cpu", "openvino cpu f32"]
    assert len({row["sha256"] for row in value["rows"]}) == 1
    assert value["rows"][1]["nodes"]["OpenVINO CPU"] > 2
    assert value["rows"][1]["peak_mib"] > 20
    assert "times as fast as the first" in capsys.readouterr().out


def test_settings_of_a_row():
    assert settings_of("onnxruntime", None) == [("onnxruntime", None)]
    assert settings_of(["openvino", "openvino"], ["bf16", "f32"]) == [("openvino", "bf16"), ("openvino", "f32")]
    assert settings_of(["onnxruntime", "openvino"], "bf16") == [("onnxruntime", None), ("openvino", "bf16")]


def row(file, ms, first=None):
    engine = open_engine(file, threads=1)
    return bench_row(engine, engine.shape(), {}, ms, first)


def test_words_for_differences_and_for_none(file):
    random = np.random.default_rng(0)
    first, same, fast = random.normal(10, 0.3, 40), random.normal(10, 0.3, 40), random.normal(5, 0.3, 40)
    assert row(file, fast, first).differs
    assert not row(file, same, first).differs
    assert speed_words((2.0, 1.9, 2.1)) == "2.00 (1.90 to 2.10)"
    assert speed_words(row(file, same, first).speed_up).endswith("not distinguishable")
    assert speed_words(None) == "1"


def test_a_throttled_machine_is_named(file):
    calm = np.random.default_rng(0).normal(10, 0.2, 40)
    result = BenchResult([row(file, calm), row(file, np.concatenate([calm[:20], calm[20:] * 1.4]))])
    (remark,) = result.remarks()
    assert "tiny.onnx (onnxruntime cpu): the second half of the runs took +4" in remark
    assert not result.rows[1].steady


STAMP = {
    "cpu": "Xeon",
    "cores": 2,
    "platform": "Linux-6",
    "machine": "x86_64",
    "cpu_features": {"VNNI": True},
    "versions": {"onnxruntime": "1.30"},
}


def stored(path, ms=10.0, *, name="a.onnx", width=0.1, stamp=None, kind="tinymim.bench", **changes):
    one = {
        "file": f"/somewhere/{name}",
        "sha256": f"{ms}",
        "engine": "onnxruntime cpu",
        "shape": [1, 3, 64, 96],
        "threads": 1,
        "p50_ms": ms,
        "p50_interval": [ms - width, ms + width],
    }
    path.write_text(json.dumps({"kind": kind, "rows": [one | changes], "environment": STAMP | (stamp or {})}))
    return path


def test_two_results_of_one_machine(tmp_path, capsys):
    before, after = stored(tmp_path / "a.json"), stored(tmp_path / "b.json", 5.0, name="b.onnx")
    (one,) = compare_benches(before, after).rows
    assert one.speed_up[0] == pytest.approx(2)
    assert 1.9 < one.speed_up[1] < 2 < one.speed_up[2] < 2.1
    assert one.differs
    arguments = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md")]
    assert cli.main(["bench", "--compare", str(before), str(after), *arguments]) == 0
    out = capsys.readouterr().out
    assert "a.onnx -> b.onnx" in out
    assert "faster" in out
    assert "next: tinymim bench" in out
    assert json.loads((tmp_path / "c.json").read_text())["kind"] == "tinymim.compare"
    assert "faster" in (tmp_path / "c.md").read_text()


def test_a_difference_that_two_sessions_explain_does_not_count(tmp_path):
    before = stored(tmp_path / "a.json", 10.0, width=0.01)
    for ms, differs in ((9.7, False), (10.3, False), (9.0, True), (11.0, True)):
        (one,) = compare_benches(before, stored(tmp_path / "b.json", ms, width=0.01)).rows
        assert one.differs is differs, ms


@pytest.mark.parametrize(
    ("stamp", "words"),
    [
        ({"cpu": "EPYC"}, "cpu: Xeon against EPYC"),
        ({"cores": 4}, "cores: 2 against 4"),
        ({"platform": "Linux-5"}, "platform: Linux-6 against Linux-5"),
        ({"cpu_features": {"VNNI": False}}, "cpu_features: VNNI against none"),
        ({"cpu_features": None}, "cpu_features: VNNI against unknown"),
        ({"versions": {"onnxruntime": "1.31"}}, "onnxruntime: 1.30 against 1.31"),
        ({"versions": {"onnxruntime": "1.30", "openvino": "2026"}}, "openvino: absent against 2026"),
    ],
)
def test_other_machines_are_refused(tmp_path, capsys, stamp, words):
    before, after = stored(tmp_path / "a.json"), stored(tmp_path / "b.json", stamp=stamp)
    assert cli.main(["bench", "--compare", str(before), str(after)]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert "cannot be compared" in err
    assert machine_differences(STAMP, STAMP | stamp) == [words]
    assert not machine_differences(STAMP, STAMP)


def test_other_threads_are_refused(tmp_path):
    with pytest.raises(CheckFailed, match=r"threads: \[1\] against \[2\]"):
        compare_benches(stored(tmp_path / "a.json"), stored(tmp_path / "b.json", threads=2))


def test_results_without_a_common_row_or_of_other_inputs(tmp_path):
    with pytest.raises(ConfigError, match="1x3x64x96 against 1x3x32x32"):
        compare_benches(stored(tmp_path / "a.json"), stored(tmp_path / "b.json", shape=[1, 3, 32, 32]))
    two = json.loads(stored(tmp_path / "a.json").read_text())
    two["rows"].append(two["rows"][0] | {"engine": "openvino cpu f32"})
    (tmp_path / "a.json").write_text(json.dumps(two))
    with pytest.raises(ConfigError, match="no row in common"):
        compare_benches(tmp_path / "a.json", stored(tmp_path / "b.json", name="c.onnx"))
    result = compare_benches(tmp_path / "a.json", stored(tmp_path / "b.json"))
    assert len(result.rows) == 1
    assert result.left_out == ["a.onnx openvino cpu f32 1x3x64x96"]


def test_files_that_are_no_results(tmp_path, file):
    good = stored(tmp_path / "a.json")
    (tmp_path / "list.json").write_text("[]")
    for bad in (tmp_path / "none.json", tmp_path / "list.json", stored(tmp_path / "b.json", kind="tinymim.eval"), file):
        with pytest.raises(DataError):
            compare_benches(good, bad)


def test_compare_measures_nothing(tmp_path, capsys, file):
    good = str(stored(tmp_path / "a.json"))
    assert cli.main(["bench", str(file), "--compare", good, good]) == 2
    assert "--compare measures nothing" in capsys.readouterr().err
    assert cli.main(["bench"]) == 2
    assert "no files to measure" in capsys.readouterr().err


def test_a_stored_result_compares_with_itself(tmp_path, file):
    """As a user runs it: a bench, and the comparison of what it wrote."""
    bench(file, runs=10, threads=1).to_json(tmp_path / "a.json")
    done = subprocess.run(
        [sys.executable, "-m", "tinymim", "bench", "--compare", "a.json", "a.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "not distinguishable (the same file)" in done.stdout
