"""The demo: the record that resumes it, the score of an ONNX file, the checks that fail it, and (slow) the whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.demo.test_report import check_self_contained
from tinymim.data.folders import read_layout
from tinymim.demo import run as demo
from tinymim.demo.report import score_onnx
from tinymim.demo.scenes import CLASSES, PALETTE, write_scenes
from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import environment


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    settings, ran = {"data": None, "seed": 0, "minutes": 6.0}, []

    def work() -> dict[str, Any]:
        ran.append(1)
        return {
            "value": 7,
            "source": "drawn",
            "size": [160, 128],
            "train": 3,
            "val": 2,
            "classes": ["a", "b"],
            "palette": [[0, 0, 0], [1, 1, 1]],
        }

    first = demo.DemoRecord(tmp_path, settings, resume=False).stage("data", work)
    again = demo.DemoRecord(tmp_path, settings, resume=True).stage("data", work)
    assert first == again
    assert first["value"] == 7
    assert first["peak_mib"] > 1
    assert len(ran) == 1
    demo.DemoRecord(tmp_path, settings, resume=False).stage("data", work)
    assert len(ran) == 2


def test_a_stage_that_fails_is_run_again(tmp_path: Path) -> None:
    record = demo.DemoRecord(tmp_path, {}, resume=False)
    record.save()
    with pytest.raises(ZeroDivisionError):
        record.stage("data", lambda: {"x": 1 // 0})
    assert demo.DemoRecord(tmp_path, {}, resume=True).stage("data", lambda: {"x": 1})["x"] == 1


def test_a_demo_is_resumed_with_the_options_it_was_begun_with(tmp_path: Path) -> None:
    demo.DemoRecord(tmp_path, {"seed": 0, "minutes": 6}, resume=False).save()
    with pytest.raises(ConfigError, match="another seed"):
        demo.DemoRecord(tmp_path, {"seed": 1, "minutes": 6}, resume=True)


@pytest.mark.parametrize("minutes", [0, -3, 1e9])
def test_minutes_that_make_no_sense(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match="minutes"):
        demo.demo(out=tmp_path / "x", minutes=minutes)


def test_a_folder_in_use_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(ConfigError, match="--overwrite"):
        demo.demo(out=tmp_path)


def colour_classifier(path: Path, size: tuple[int, int]) -> None:
    """An ONNX segmentor that says class 1 where normalised red is above normalised blue, else class 0."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((12, 3, 1, 1), np.float32)
    weight[1, 0], weight[1, 2], weight[2:, 0], bias = 1, -1, 0, np.full(12, -99, np.float32)
    bias[:2] = 0
    node = helper.make_node("Conv", ["image", "w", "b"], ["logits"])
    shape = ["batch", 3, *size]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12, *size])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    for key, value in (("mean", [100.0, 120.0, 140.0]), ("std", [50.0, 60.0, 40.0])):
        model.metadata_props.add(key=f"tinymim.{key}", value=json.dumps(value))
    onnx.save(model, path)


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, demo.DemoRecord]:
    """A demo folder in which everything but the last words is done; its segmentor is the colour classifier."""
    out = tmp_path / "demo"
    write_scenes(out / "data", train=2, val=3, size=(64, 48), seed=5)
    label = out / "data" / "annotations" / "validation" / "scene_00001.png"
    ids = np.array(Image.open(label))
    ids[:10] = 255
    Image.fromarray(ids).save(label)
    colour_classifier(out / "segmentor.onnx", (48, 64))
    for folder in ("teacher", "student", "segmentor"):
        (out / folder).mkdir()
        lines = [{"step": i, "loss": 3.0 / i, "qk": 1.0 / i, "vv": 2.0 / i} for i in range(1, 60)]
        lines += [{"step": 0, "val_loss": 3.0}, {"step": 59, "val_loss": 0.5}]
        (out / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    time = {"seconds": 10.0, "cpu_seconds": 9.0, "peak_mib": 1000.0}
    shape = {"depth": 4, "embed_dim": 192}
    learned = {"steps": 59, "val": [[0, 3.0], [59, 0.5]], "shape": shape, "parameters": 1_900_000} | time
    score = score_onnx(out)
    parity = {
        "name": "logits",
        "shape": [1, 3, 48, 64],
        "source": "random",
        "max_error": 1e-6,
        "relative_error": 1e-7,
        "cosine": 1.0,
        "equal_pixels": 1.0,
        "passed": True,
        "remark": "",
    }
    part = {"part": "head", "params": 12, "macs": 10_000_000, "ms": 4.5, "share": 1.0}
    row = {
        "file": str(out / "segmentor.onnx"),
        "p50_ms": 5.0,
        "p90_ms": 5.5,
        "p95_ms": 6.0,
        "p99_ms": 7.0,
        "images_per_s": 200.0,
        "peak_mib": 90.0,
        "file_mib": 11.4,
        "threads": 2,
        "shape": [1, 3, 48, 64],
        "provider": "CPUExecutionProvider",
    }
    record = demo.DemoRecord(out, {"data": None, "seed": 5, "minutes": 6.0}, resume=False)
    record.value["environment"] = environment()
    record.value["stages"] = {
        "data": {
            "source": "scenes <drawn>",
            "train": 2,
            "val": 3,
            "size": [64, 48],
            "classes": CLASSES,
            "palette": PALETTE,
        }
        | time,
        "teacher": learned,
        "student": learned,
        "segmentor": {
            "mIoU": score["mIoU"],
            "aAcc": 0.5,
            "constant_mIoU": score["mIoU"] / 4,
            "images": 3,
            "steps": 59,
            "class_IoU": {name: None if i == 3 else i / 12 for i, name in enumerate(CLASSES)},
        }
        | time,
        "export": {
            "parity": {"passed": True, "rows": [parity], "summary": {"equal_pixels": 1.0, "relative_error": 1e-7}},
            "cost": {"parts": {"head": {"params": 12}}},
        }
        | time,
        "measure": {
            "onnx": score,
            "rows": [row],
            "splits": [{"rows": [part], "ratio": 0.9, "remarks": ["the head <x>"]}],
        }
        | time,
    }
    return out, record


def test_score_of_an_onnx_file(finished: tuple[Path, demo.DemoRecord]) -> None:
    """Against a plain recomputation: normalisation, ignored pixels, absent classes, order of the photos."""
    out, record = finished
    right, union = np.zeros(12), np.zeros(12)
    for photo_path, label_path in read_layout(out / "data").val:
        red, _, blue = np.asarray(Image.open(photo_path).convert("RGB"), np.float64).transpose(2, 0, 1)
        guess = ((red - 100) / 50 > (blue - 140) / 40).astype(int)
        truth = np.asarray(Image.open(label_path))
        saved = np.asarray(Image.open(out / "predictions" / f"{photo_path.stem}.png"))
        assert (saved == guess).mean() > 0.999
        for k in range(12):
            a, b = (guess == k) & (truth != 255), truth == k
            right[k] += (a & b).sum()
            union[k] += (a | b).sum()
    score = record.value["stages"]["measure"]["onnx"]
    assert score["images"] == 3
    assert score["mIoU"] == pytest.approx((right[union > 0] / union[union > 0]).mean(), abs=1e-4)
    values = [value for value, _ in score["shown"]]
    assert values == sorted(values, reverse=True)


def test_report_of_the_demo(finished: tuple[Path, demo.DemoRecord], capsys: pytest.CaptureFixture) -> None:
    out, record = finished
    result = demo._finish(out, record)
    page = check_self_contained(Path(result.report))
    for words in (
        "scenes <drawn>",
        "4 times the best constant",
        "from 3.000 to 0.500",
        "11.4",
        "tinymim bench",
        "The head <x>.",
        "mIoU",
    ):
        assert words in page.text, words
    assert sum(tag == "img" and name == "src" for tag, name, _ in page.attributes) == 9
    assert result.passed
    assert result.seconds == 60
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["mIoU", "loss", "pixels", "onnx"])
def test_a_check_that_fails_fails_the_demo(finished: tuple[Path, demo.DemoRecord], what: str) -> None:
    out, record = finished
    stages = record.value["stages"]
    if what == "mIoU":
        stages["segmentor"]["constant_mIoU"] = stages["segmentor"]["mIoU"] / 2.9
    elif what == "loss":
        stages["student"] = stages["student"] | {"val": [[0, 0.5], [59, 0.5]]}
    elif what == "pixels":
        stages["export"]["parity"]["passed"] = False
    else:
        stages["measure"]["onnx"]["mIoU"] += 0.01
    with pytest.raises(CheckFailed) as failure:
        demo._finish(out, record)
    assert failure.value.exit_code == 1
    assert (out / "report.html").is_file()
    assert sum(not good for good in json.loads((out / "demo.json").read_text())["checks"].values()) == 1


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    """The README's first command. Nothing is stubbed; about five minutes on two cores."""
    command = [sys.executable, "-m", "tinymim", "demo", "--out", "runs/demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "runs" / "demo"
    record = json.loads((out / "demo.json").read_text())
    stages = record["stages"]
    seg = stages["segmentor"]
    assert seg["mIoU"] >= 3 * seg["constant_mIoU"]
    assert 0.02 < seg["constant_mIoU"] < 0.06
    assert stages["student"]["val"][-1][1] < 0.5 * stages["student"]["val"][0][1]
    assert all(record["checks"].values())
    assert stages["export"]["parity"]["summary"]["photos"]
    for folder in (".", "teacher", "student", "segmentor"):
        check_self_contained(out / folder / "report.html")
    for file in ("teacher/student.pth", "student/student.pth", "segmentor/segmentor.pth", "segmentor.onnx"):
        assert (out / file).is_file(), file
    assert "next: " in done.stdout
    assert not done.stderr.strip(), done.stderr[-2000:]

    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    resumed = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert json.loads((out / "demo.json").read_text())["stages"] == stages
