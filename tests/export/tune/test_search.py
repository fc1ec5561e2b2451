"""The whole verdict on a tiny real segmentor: files, scores, card, report, resuming, refusals."""

import json
import re
import shutil

import numpy as np
import onnxruntime as ort
import pytest

from tests.export.tiny import HEIGHT, WIDTH, write_labelled, write_segmentor
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.folders import hold
from tinymim_export.runtime.metadata import graph_sha256, load_proto, proto_metadata
from tinymim_export.runtime.miou import evaluate
from tinymim_export.tune import measure as tune_run
from tinymim_export.tune.search import tune
from tinymim_export.tune.verdict import Budget

LOOSE = dict(max_miou_drop=100, min_speedup=0)  # every candidate is promoted, whatever the machine's mood
QUICK = dict(seconds=0.01, threads=1, count=4, variants=("pixels",), precisions=("int8",))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("tune") / "data")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp("tune") / "tiny.onnx")


@pytest.fixture(scope="module", autouse=True)
def _no_warm_up():
    """Times do not matter here."""
    real = tune_run.interleave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_run, "interleave", lambda timers, **options: real(timers, warm_up=0, **options))
        yield


@pytest.fixture(scope="module")
def tuned(file, data, tmp_path_factory, _no_warm_up):
    """One full run on both runtimes."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("tuned")
    result = tune(file, folder / "best.onnx", data=data, runtimes=("onnxruntime", "openvino"), **LOOSE, **QUICK)
    return result, folder


def test_candidates_and_their_figures(tuned, data):
    result, _ = tuned
    names = {(c.name, c.engine) for c in result.candidates}
    assert {("fp32", "onnxruntime cpu"), ("fp32 + pixels", "onnxruntime cpu"), ("fp32", "openvino cpu f32")} <= names
    assert any(c.precision == "int8" and c.runtime == "onnxruntime" for c in result.candidates)
    first, *others = result.candidates
    assert first.verdict == "BASELINE"
    assert first.speed_up == (1, 1, 1)
    assert first.drop == 0
    assert first.mIoU > 0.8
    for c in others:
        assert c.verdict == "PROMOTED"
        assert c.drop == pytest.approx(first.mIoU - c.mIoU)
        assert c.drop_interval[0] <= c.drop_interval[1]
        assert c.p50_interval[0] <= c.p50_ms <= c.p50_interval[1]
        assert c.shape == (1, 3, HEIGHT, WIDTH)
        assert c.images == 6
        assert c.facts["top_operators"]


def test_every_file_is_scored_itself(tuned, data):
    """The stored mIoU of an INT8 file is what tinymim eval gives for that file, not its parent's."""
    result, folder = tuned
    c = next(c for c in result.candidates if c.precision == "int8")
    path = folder / "best.tune" / c.file
    again = evaluate(path, data, runtime=c.runtime, precision=c.arithmetic, threads=1, quiet=True)
    assert again.sha256 == c.sha256
    assert again.miou == c.mIoU
    assert proto_metadata(load_proto(path))["precision"]["name"] == "int8"


def test_the_winner_carries_its_card(tuned):
    result, folder = tuned
    proto = load_proto(folder / "best.onnx")
    card = proto_metadata(proto)["tune"]
    assert card["verdict"] == "PROMOTED"
    assert (card["runtime"], card["precision"]) == (result.winner.runtime, result.winner.arithmetic)
    assert card["measured_sha256"] == result.winner.sha256
    assert card["budget"]["max_miou_drop"] == 100
    assert graph_sha256(proto) == graph_sha256(load_proto(folder / "best.tune" / result.winner.file))
    session = ort.InferenceSession(folder / "best.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"


def test_what_is_written(tuned):
    result, folder = tuned
    value = json.loads((folder / "best.tune" / "tune.json").read_text())
    assert value["kind"] == "tinymim.tune"
    assert value["winner"]["sha256"] == result.winner.sha256
    assert value["environment"]["cpu"]
    written = value["candidates"][-1]  # the winner under the sha256 of its copy, so that reports can join it
    assert written["sha256"] == result.onnx_sha256
    assert written["copy_of"] == result.winner.sha256
    assert len(value["candidates"]) == len(result.candidates) + 1
    page = (folder / "best.tune" / "report.html").read_text()
    assert "Pareto plot" in page
    assert "WINNER" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "| WINNER |" in (folder / "best.tune" / "tune.md").read_text()
    assert any(line.startswith("tinymim predict") for line in result.next)
    assert all((folder / "best.tune" / c.file).is_file() for c in result.candidates)
    assert len(list((folder / "best.tune" / "scores").iterdir())) == len(result.candidates)


def test_rounds_of_uneven_pace_are_said(tuned):
    from dataclasses import replace

    result, _ = tuned
    even = replace(result, candidates=[replace(c, original_ms=10.0) for c in result.candidates])
    assert not even.doubts()
    even.candidates[-1].original_ms = 20.0
    assert "compare files by 'times as fast'" in even.doubts()[0]
    assert even.doubts()[0] in even.to_markdown()


def test_a_second_run_measures_nothing_again(tuned, file, data, monkeypatch, capsys):
    result, folder = tuned
    stored = {c.key: c.p50_ms for c in result.candidates}
    monkeypatch.setattr(tune_run.Run, "_round", lambda *_: pytest.fail("measured again"))
    again = tune(file, folder / "best.onnx", data=data, runtimes=("onnxruntime", "openvino"), **LOOSE, **QUICK)
    assert "resuming after" in capsys.readouterr().out
    assert {c.key: c.p50_ms for c in again.candidates} == stored


def test_another_budget_judges_anew_without_measuring(tuned, file, data, tmp_path, monkeypatch, capsys):
    """And nothing promoted is exit code 1, with the results left behind and no file written."""
    shutil.copytree(tuned[1], tmp_path / "copy")
    (tmp_path / "copy" / "best.onnx").unlink()
    monkeypatch.setattr(tune_run.Run, "_round", lambda *_: pytest.fail("measured again"))
    options = dict(data=data, runtimes=("onnxruntime", "openvino"), **QUICK)
    with pytest.raises(CheckFailed, match="keeps the budget") as caught:
        tune(file, tmp_path / "copy" / "best.onnx", max_miou_drop=100, min_speedup=1e6, **options)
    assert caught.value.exit_code == 1
    assert "nearest:" in caught.value.why
    assert not (tmp_path / "copy" / "best.onnx").exists()
    value = json.loads((tmp_path / "copy" / "best.tune" / "tune.json").read_text())
    assert value["winner"] is None
    assert {c["verdict"] for c in value["candidates"]} == {"BASELINE", "REJECTED"}
    assert "nothing is promoted" in (tmp_path / "copy" / "best.tune" / "report.html").read_text().lower()
    assert "REJECTED" in capsys.readouterr().out


def test_other_settings_or_another_machine_start_again(tuned, file, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(tuned[1], folder)
    path = folder / "best.tune" / "tune.json"
    value = json.loads(path.read_text())
    value["environment"]["cpu"] = "another"
    path.write_text(json.dumps(value))
    options = dict(data=data, runtimes=("onnxruntime",), **LOOSE, **(QUICK | dict(variants=(), precisions=("fp32",))))
    with pytest.raises(CheckFailed, match="none of 0 candidates"):  # the original alone: nothing to promote
        tune(file, folder / "best.onnx", limit=3, **options)
    out = capsys.readouterr().out
    assert "measured again" in out
    assert "cpu: another against" in out
    assert "limit: None against 3" in out
    assert json.loads(path.read_text())["candidates"][0]["images"] == 3


def test_an_interrupted_run_goes_on(file, data, tmp_path, monkeypatch):
    options = dict(data=data, runtimes=("onnxruntime",), **LOOSE, **QUICK)
    real, calls = tune_run.Run._row, []

    def stop(self, one, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(one.name)
        return real(self, one, *rest)

    monkeypatch.setattr(tune_run.Run, "_row", stop)
    with pytest.raises(KeyboardInterrupt):
        tune(file, tmp_path / "best.onnx", **options)
    assert calls == ["fp32", "fp32 + pixels"]
    monkeypatch.setattr(tune_run.Run, "_row", lambda self, one, *rest: calls.append(one.name) or real(self, one, *rest))
    result = tune(file, tmp_path / "best.onnx", **options)
    assert len(calls) == len(set(calls)) == len(result.candidates)


def test_int8_that_loses_too_much_is_tried_with_blocks_in_float(file, data, tmp_path, capsys):
    """A budget of nothing lost at all: plain INT8 differs in some pixel, so the exclusion is tried and named."""
    options = QUICK | dict(variants=())
    with pytest.raises(CheckFailed):
        tune(
            file,
            tmp_path / "best.onnx",
            data=data,
            runtimes=("onnxruntime",),
            max_miou_drop=0,
            min_speedup=1e6,
            **options,
        )
    value = json.loads((tmp_path / "best.tune" / "tune.json").read_text())
    tried = [c["name"] for c in value["candidates"]] + [what for what, _ in value["left_out"]]
    plain = next(c for c in value["candidates"] if c["name"] == "int8")
    assert ("int8 within the budget" in tried) == (plain["drop"] > 0)


def test_absent_providers_are_listed_and_asked_for_ones_refused(file, data, tmp_path, capsys):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA is here")
    result = tune(file, tmp_path / "best.onnx", data=data, limit=2, **LOOSE, **(QUICK | dict(precisions=("fp32",))))
    left = dict(result.left_out)
    assert "CUDAExecutionProvider" in left["onnxruntime cuda"]
    assert "TensorrtExecutionProvider" in left["onnxruntime tensorrt"]
    assert "left out: onnxruntime cuda: not here" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no CUDAExecutionProvider"):
        tune(file, tmp_path / "other.onnx", data=data, runtimes=("cuda",), **QUICK)
    assert not (tmp_path / "other.tune").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(runtimes=("tvm",)), "--runtimes tvm is unknown"),
        (dict(precisions=("int4",)), "--precisions int4 is unknown"),
        (dict(variants=("magic",)), "--variants magic is unknown"),
        (dict(max_miou_drop=-1), "--max-miou-drop -1"),
        (dict(min_speedup=float("nan")), "--min-speedup nan"),
        (dict(seconds=-1), "--seconds -1"),
        (dict(size=(64, 64)), "belong to an export"),
    ],
)
def test_bad_options(file, data, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        tune(file, tmp_path / "best.onnx", data=data, **(QUICK | changes))


def test_bad_files_and_photos(file, data, tmp_path):
    with pytest.raises(ConfigError, match="is not a name for the winner"):
        tune(file, tmp_path / "best", data=data)
    with pytest.raises(ConfigError, match="are one file"):
        tune(file, file, data=data)
    with pytest.raises(DataError, match="no file at"):
        tune(tmp_path / "none.pth", tmp_path / "best.onnx", data=data)
    with pytest.raises(DataError):
        tune(file, tmp_path / "best.onnx", data=tmp_path / "nowhere")
    grey = write_labelled(tmp_path / "grey")
    from PIL import Image

    for photo in (grey / "images" / "training").iterdir():
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 128, np.uint8)).save(photo)
    with pytest.raises(DataError, match="cannot calibrate"):
        tune(file, tmp_path / "best.onnx", data=data, calibration=grey, **QUICK)
    from tinymim_export.precision.quantize import quantize

    quantize(file, tmp_path / "int8.onnx", precision="int8-weights")
    with pytest.raises(ConfigError, match="is not a plain FP32 file"):
        tune(tmp_path / "int8.onnx", tmp_path / "best.onnx", data=data, **QUICK)


@pytest.mark.slow
def test_a_checkpoint_on_real_photos(shared, tmp_path):
    """From segmentor.pth to the winner and its report: export, windows, real calibration photos, both runtimes."""
    pytest.importorskip("openvino")
    from tests.export import camvid

    folder = camvid.write_folder(tmp_path / "camvid", shared / "data" / "camvid")
    checkpoint = camvid.write_segmentor(tmp_path / "slide.pth", folder, test=camvid.SLIDE)
    result = tune(
        checkpoint,
        tmp_path / "best.onnx",
        data=folder,
        size=(96, 128),
        calibration=folder / "images" / "validation",
        count=4,
        seconds=0.05,
        threads=1,
        max_miou_drop=100,
        min_speedup=0,
    )
    names = [c.name for c in result.candidates]
    assert {"fp32", "fp32 + attention", "fp32 + pixels"} <= set(names)
    assert any(name.startswith("int8") for name in names)
    assert {c.runtime for c in result.candidates} == {"onnxruntime", "openvino"}
    assert {c.mode for c in result.candidates} == {"slide"}
    assert {c.images for c in result.candidates} == {4}
    exact = [c for c in result.candidates if c.precision == "fp32" and c.arithmetic in (None, "f32")]
    assert all(abs(c.drop) < 1e-3 for c in exact)
    meta = proto_metadata(load_proto(tmp_path / "best.onnx"))
    assert meta["tune"]["original_sha256"] == result.candidates[0].sha256
    assert (tmp_path / "best.tune" / "report.html").is_file()


def test_the_command(file, data, tmp_path, capsys):
    pytest.importorskip("openvino")
    from tinymim_export.cli import main

    arguments = [
        "--from",
        str(file),
        "--onnx",
        str(tmp_path / "best.onnx"),
        "--tune",
        "--data",
        str(data),
        "--limit",
        "3",
    ]
    arguments += ["--runtimes", "onnxruntime", "--graph", "pixels", "--calibration-count", "4", "--seconds", "0.01"]
    assert main([*arguments, "--max-miou-drop", "100", "--min-speedup", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "winner: " in out
    assert "next: tinymim predict" in out
    assert main([*arguments, "--min-speedup", "1000000", "--latency-budget", "0.0001ms"]) == 1
    captured = capsys.readouterr()
    assert "REJECTED" in captured.out
    assert "keeps the budget" in captured.err
    assert main([*arguments, "--precision", "int8"]) == 2


def test_files_of_other_settings_are_gone_before_the_new_record_stands(tmp_path):
    """Killed right after it, the search is resumed, and must not take the old files for its own."""

    def begin(**more):
        return tune_run.Run(tmp_path, {"threads": 1, "seed": 0, **more}, Budget(0.5, 1.2, None), lambda _: None)

    begin()
    (tmp_path / "fp32.onnx").touch()
    assert begin().resumed
    assert (tmp_path / "fp32.onnx").is_file()
    assert not begin(seed=1).resumed
    assert [path.name for path in tmp_path.iterdir()] == ["tune.json"]


def test_two_searches_at_once_are_refused_and_a_folder_of_others_stays(file, data, tmp_path, monkeypatch):
    folder = tmp_path / "best.tune"
    with hold(folder), pytest.raises(ConfigError, match="is in use"):
        tune(file, tmp_path / "best.onnx", data=data, **QUICK)
    folder.mkdir()
    (folder / "mine.txt").touch()

    def none(*_):
        raise ConfigError("no such runtime here", "it is not installed", "install it")

    monkeypatch.setattr("tinymim_export.tune.search._targets_here", none)
    with pytest.raises(ConfigError, match="no such runtime here"):
        tune(file, tmp_path / "best.onnx", data=data, **QUICK)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
