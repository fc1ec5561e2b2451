"""A runtime and a precision from outside the package enter every command that names runtimes or precisions."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.export.tiny import HEIGHT, WIDTH, write_labelled, write_segmentor
from tinymim import cli
from tinymim.cli.doctor import machine
from tinymim.errors import ConfigError
from tinymim_export import bench, evaluate, main
from tinymim_export.bench.compare import machine_differences
from tinymim_export.precision import PRECISIONS, register_precision
from tinymim_export.report.artifacts import onnx_file
from tinymim_export.report.lineage_report import build_report
from tinymim_export.runtime.engines import RUNTIMES, open_engine, packages, provider_word, register_runtime
from tinymim_export.runtime.metadata import load_proto, proto_metadata
from tinymim_export.tune.search import tune
from tinymim_export.tune.targets import targets

ROOT = Path(__file__).parents[2]
STATIC = ("int8", "int8-smooth", "int8-wide")
BUILT_IN = ["onnxruntime", "openvino", "executorch"], ["fp32", "fp16", *STATIC, "int8-dynamic", "int8-weights"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("registries") / "data")


@pytest.fixture
def file(tmp_path):
    return write_segmentor(tmp_path / "tiny.onnx")


@pytest.fixture
def toys(monkeypatch):
    """Both registered while a test runs; a child process finds them by their module."""
    from tests.export import toys

    RUNTIMES.setdefault("reference", toys.ReferenceEngine)
    PRECISIONS.setdefault("bf16-weights", toys.Bf16Weights())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    yield toys
    del RUNTIMES["reference"], PRECISIONS["bf16-weights"]


def help_of(run, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(argv)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_what_is_built_in():
    assert (list(RUNTIMES), list(PRECISIONS)) == BUILT_IN
    found = {word: [(target.engine, target.precisions) for target in group] for word, group in targets().items()}
    assert list(found.items()) == [
        ("onnxruntime", [("onnxruntime cpu", ("int8", "int8-smooth", "int8-dynamic", "int8-weights"))]),
        ("openvino", [("openvino cpu f32", STATIC), ("openvino cpu bf16", STATIC)]),
        ("cuda", [("onnxruntime cuda", ("fp16",))]),
        ("tensorrt", [("onnxruntime tensorrt", ("fp16", "int8", "int8-smooth"))]),
    ]


def test_a_name_is_registered_once(toys):
    with pytest.raises(ConfigError, match="runtime 'reference' is registered already"):
        register_runtime(toys.ReferenceEngine)
    with pytest.raises(ConfigError, match="precision 'bf16-weights' is registered already"):
        register_precision(toys.Bf16Weights)


@pytest.mark.parametrize("verb", ["bench", "eval", "predict"])
def test_help_lists_what_is_registered(verb, toys, capsys):
    text = help_of(cli.main, [verb, "--help"], capsys)
    assert "{onnxruntime,openvino,executorch,reference}" in text
    assert "{cpu,cuda,tensorrt,numpy}" in text
    assert "{f32,bf16,strict}" in text


def test_export_help_lists_what_is_registered(toys, capsys):
    text = help_of(main, ["--help"], capsys)
    assert "fp32, fp16, int8, int8-smooth, int8-wide, int8-dynamic, int8-weights, bf16-weights; default: fp32" in text
    assert "onnxruntime, openvino, reference, cuda, tensorrt; default: those that are here" in text


def test_a_runtime_from_outside_is_timed_and_scored(toys, file, data, tmp_path):
    out = tmp_path / "bench.json"
    both = ["--runtime", "onnxruntime", "--runtime", "reference", "--runs", "10", "--threads", "1"]
    assert cli.main(["bench", str(file), *both, "--json", str(out)]) == 0
    value = json.loads(out.read_text())
    row = value["rows"][1]
    assert (row["engine"], row["provider"], row["gpu"]) == ("reference numpy strict", "ReferenceEvaluator", None)
    assert row["nodes"] == {"ReferenceEvaluator": 6}
    assert row["peak_mib"] > 20  # measured in a child process, which knows the runtime, too
    assert value["settings"]["runtime"] == [["onnxruntime", None], ["reference", None]]
    options = ["--data", str(data), "--runtime", "reference", "--provider", "numpy", "--threads", "1"]
    assert cli.main(["eval", str(file), *options, "--json", str(tmp_path / "eval.json")]) == 0
    scored = json.loads((tmp_path / "eval.json").read_text())
    assert scored["engine"] == "reference numpy strict"
    assert scored["mIoU"] == pytest.approx(evaluate(file, data, threads=1, quiet=True).miou, abs=1e-3)


def test_a_runtime_from_outside_gives_the_same_logits_and_the_usual_errors(toys, file):
    engine = open_engine(file, runtime="reference", provider="numpy", threads=1)
    image = np.random.default_rng(0).standard_normal((1, 3, HEIGHT, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(engine.run(image), open_engine(file, threads=1).run(image), atol=1e-4)
    with pytest.raises(ConfigError, match="its height and width are 64x96"):
        engine.run(image[:, :, :32])
    for options, words in (
        (dict(provider="cpu"), "the ONNX reference has no provider 'cpu'"),
        (dict(provider="numpy", compute_type="bf16"), "precision 'bf16' is unknown: the ONNX reference takes strict"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_engine(file, runtime="reference", **options)
        assert words in f"{caught.value.what}: {caught.value.why}"
    with pytest.raises(ConfigError, match="setting of OpenVINO and the ONNX reference"):
        open_engine(file, compute_type="strict")


def test_doctor_comparison_and_reports_know_it(toys):
    assert machine()["runtimes"]["reference numpy"] == "here strict"
    assert "onnx" in packages()
    stamps = [{"versions": {"onnx": version}} for version in ("1", "2")]
    assert machine_differences(*stamps) == ["onnx: 1 against 2"]
    assert provider_word("ReferenceEvaluator") == "numpy"
    assert provider_word("CUDAExecutionProvider") == "cuda"
    assert provider_word("SomethingElse") == "SomethingElse"


def test_a_precision_from_outside_is_written_verified_and_reported(toys, file, tmp_path, capsys):
    out = tmp_path / "weights.onnx"
    assert main(["--from", str(file), "--onnx", str(out), "--precision", "bf16-weights"]) == 0
    printed = capsys.readouterr().out
    assert "3 weights were rounded to bfloat16" in printed
    assert "cosine >= 0.999" in printed
    meta = proto_metadata(load_proto(out))
    assert meta["precision"]["name"] == "bf16-weights"
    assert meta["parity"]["thresholds"] == {"cosine": 0.999, "equal_pixels": 0.9}
    assert meta["verified"]
    assert onnx_file(out).precision == "bf16-weights"
    page = tmp_path / "report.html"
    build_report([file, out], out=page)
    assert "bf16-weights" in page.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "photos"], "only static INT8 measures ranges"),
        (["--exclude-blocks", "head"], "excludes no blocks"),
        (["--max-miou-drop", "1", "--data", "photos"], "needs an INT8 precision"),
    ],
)
def test_options_it_does_not_take_are_refused(toys, file, tmp_path, capsys, options, words):
    argv = ["--from", str(file), "--onnx", str(tmp_path / "out.onnx"), "--precision", "bf16-weights", *options]
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_tune_tries_both(toys, file, data, tmp_path):
    result = tune(
        file,
        tmp_path / "best.onnx",
        data=data,
        runtimes=("onnxruntime", "reference"),
        precisions=("bf16-weights", "int8"),
        variants=(),
        max_miou_drop=100,
        min_speedup=0,
        limit=2,
        count=4,
        seconds=0.01,
        threads=1,
    )
    found = {(c.precision, c.engine) for c in result.candidates}
    assert ("bf16-weights", "onnxruntime cpu") in found  # the precision names the runtime
    assert ("int8", "reference numpy strict") in found  # the runtime names the precision
    assert ("fp32", "reference numpy strict") in found


def test_keywords_of_0_1_still_work(toys, file):
    assert open_engine(file, runtime="reference", provider="numpy", precision="strict").compute_type == "strict"
    result = bench(file, runtime="reference", provider="numpy", precision="strict", runs=10, threads=1)
    assert result.rows[0].engine == "reference numpy strict"
    with pytest.raises(TypeError, match="got both compute_type and precision"):
        open_engine(file, precision="strict", compute_type="strict")
