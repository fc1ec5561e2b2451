"""The report on a lineage: facts read without PyTorch, joined by sha256, like compared with like, a page that loads
nothing."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tinymim.cli import main
from tinymim.errors import DataError, TinyMIMError
from tinymim.files import describe_file, describe_files, environment, note_output, sha256_file, write_env, write_json
from tinymim.models import ViT, save_student
from tinymim_export import build_report
from tinymim_export.report.artifacts import flat_settings, read_paths, weights_file
from tinymim_export.report.compare import compare_reports, kind_of
from tinymim_export.report.figures import BETTER, OTHER, WORSE, bars, class_losses, difference_image
from tinymim_export.report.lineage import Lineage
from tinymim_export.report.plots import ScatterPoint, pareto_front, scatter
from tinymim_export.report.tensor_shapes import read_weights
from tinymim_export.runtime.metadata import write_metadata

CLASSES, SIDE = ["sky", "road", "<b>tree</b>"], 16
ENV = {"platform": "test", "cpu": "Slow & Old CPU", "cores": 2, "versions": {"onnxruntime": "1.31.1"}}


def write_onnx(path, weights, **meta):
    """A one-layer segmentor: class logits are linear in the pixel."""
    nodes = [helper.make_node("Conv", ["image", "w"], ["logits"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, SIDE, SIDE])
        for name, channels in (("image", 3), ("logits", 3))
    ]
    w = numpy_helper.from_array(np.asarray(weights, np.float32).reshape(3, 3, 1, 1), "w")
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [w]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    if meta is not None:
        contract = {
            "part": "segmentor",
            "classes": CLASSES,
            "palette": [[0, 0, 250], [90, 90, 90], [0, 200, 0]],
            "mean": [120.0] * 3,
            "std": [60.0] * 3,
            "stride": 1,
            "verified": True,
            "parity": {"cosine": 1.0},
            "resize": {"scale": [SIDE, SIDE], "keep_ratio": False, "mode": "whole"},
            "cost": {"size": [SIDE, SIDE], "parts": {"head": {"params": 9, "macs": 2304}}},
        }
        write_metadata(proto, contract | meta)
    onnx.save(proto, path)
    return path


def confusion(wrong, pixels=900):
    """300 pixels a class, ``wrong`` of the first one taken for the second."""
    matrix = np.diag([pixels // 3] * 3)
    matrix[0, 0], matrix[0, 1] = matrix[0, 0] - wrong, wrong
    return matrix


def eval_result(path, wrong, *, engine="onnxruntime cpu", mode="whole", pixels=900):
    """What ``tinymim eval --json`` writes, for two photos of the same content."""
    matrix = confusion(wrong, pixels)
    right, labelled, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = right / (labelled + predicted - right)
    return {
        "kind": "tinymim.eval",
        "file": path.name,
        "sha256": sha256_file(path),
        "engine": engine,
        "mode": mode,
        "mIoU": float(iou.mean()),
        "mAcc": 0.5,
        "aAcc": 0.5,
        "constant_mIoU": 0.1,
        "images": 2,
        "class_IoU": dict(zip(CLASSES, iou.tolist(), strict=True)),
        "confusion": (2 * matrix).tolist(),
        "photos": {
            "names": ["a", "b"],
            "right": [right.tolist()] * 2,
            "labelled": [labelled.tolist()] * 2,
            "predicted": [predicted.tolist()] * 2,
        },
        "data": "/home/somebody/photos",
        "split": "val",
        "seconds": 1.0,
        "notes": [],
        "environment": ENV,
    }


def bench_result(times, env=ENV):
    """What ``tinymim bench --json`` writes: {path: ms}, in turns with the first."""
    first = next(iter(times.values()))
    rows = [
        {
            "file": path.name,
            "sha256": sha256_file(path),
            "engine": "onnxruntime cpu",
            "shape": [1, 3, SIDE, SIDE],
            "provider": "CPUExecutionProvider",
            "threads": 2,
            "p50_ms": ms,
            "p50_interval": [0.99 * ms, 1.01 * ms],
            "p90_ms": 1.1 * ms,
            "speed_up": None if ms == first else [f * first / ms for f in (1, 0.98, 1.02)],
        }
        for path, ms in times.items()
    ]
    return {"kind": "tinymim.bench", "rows": rows, "environment": env}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run folders teacher, student, segmentor; FP32 and INT8 files; scores and times."""
    root = tmp_path_factory.mktemp("lineage")
    torch.manual_seed(0)
    photos = [root / f"photo{i}.bin" for i in range(3)]
    for photo in photos:
        photo.write_bytes(b"x" * 10)
    shape = dict(img_size=32, embed_dim=12, depth=1, num_heads=2)
    for name, meta, inputs in (("teacher", {"method": "mae"}, None), ("student", {"method": "tinymim"}, "teacher")):
        folder = root / name
        source = root / str(inputs) / "student.pth"
        told = {
            "teacher": describe_file(source) if inputs else None,
            "data": describe_files(root, photos),
            "recipe_sha256": name[0] * 64,
        }
        folder.mkdir()
        write_env(folder, told)
        parent = {"teacher_sha256": told["teacher"]["sha256"]} if inputs else {}
        save_student(ViT(**shape), folder / "student.pth", meta | parent)
        note_output(folder, "student.pth")
        (folder / "config.py").write_text(
            f'"""Resolved recipe of this run (tinymim x --data /home/me/p)."""\n\n'
            f"seed = 0\nmethod = {meta['method']!r}\nargs = dict(a=1)\n"
        )
        lines = [{"step": i, "loss": 2.0 / i, "lr": 0.1} for i in range(1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in lines))
    folder = root / "segmentor"
    folder.mkdir()
    write_env(folder, {"student": describe_file(root / "student/student.pth"), "config_sha256": "c" * 64})
    state = {
        "backbone.w": torch.zeros(4, 5),
        "decode_head.conv_seg.weight": torch.zeros(3, 2),
        "decode_head.bn.running_mean": torch.zeros(7),
        "auxiliary_head.w": torch.zeros(100),
    }
    meta = {"config": "a = 1\n", "student_sha256": sha256_file(root / "student/student.pth")}
    torch.save({"state_dict": state, "meta": meta}, folder / "segmentor.pth")
    note_output(folder, "segmentor.pth")
    write_json(
        folder / "result.json",
        {"mIoU": 0.9, "images": 2, "class_IoU": dict.fromkeys(CLASSES, 0.9), "confusion": (2 * confusion(20)).tolist()},
    )
    origin = {"checkpoint_sha256": sha256_file(folder / "segmentor.pth")}
    fp32 = write_onnx(root / "fp32.onnx", np.eye(3), **origin)
    photos = [[f"p{i}.jpg", f"{i:016x}"] for i in range(3)]
    calibration = {
        "folder": "train",
        "count": 3,
        "seed": 0,
        "method": "percentile",
        "files": photos,
        "list_sha256": "d",
    }
    precision = {"name": "int8", "parent_sha256": sha256_file(fp32), "calibration": calibration, "excluded": ["head"]}
    int8 = write_onnx(root / "int8.onnx", [1, 0.4, 0, 0, 1, 0, 0, 0, 1], **origin, precision=precision)
    for path, wrong in ((fp32, 20), (int8, 26)):
        write_json(root / f"{path.stem}.eval.json", eval_result(path, wrong))
    write_json(root / "bench.json", bench_result({fp32: 40.0, int8: 16.0}))
    return SimpleNamespace(root=root, fp32=fp32, int8=int8)


def test_reads_weights_without_torch(made, tmp_path):
    """Shapes and meta equal what torch reads; nothing in the file is run."""
    path = made.root / "student/student.pth"
    shapes, meta = read_weights(path)
    content = torch.load(path, weights_only=True)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
    assert meta == content["meta"]
    torch.save({"model": {"w": torch.nn.Parameter(torch.zeros(2, 3))}, "meta": {"bad": Evil()}}, tmp_path / "evil.pth")
    shapes, meta = read_weights(tmp_path / "evil.pth")
    assert shapes == {"w": (2, 3)}
    assert not (tmp_path / "ran").exists()
    save_student(
        ViT(img_size=32, embed_dim=12, depth=1, num_heads=2), tmp_path / "s.safetensors", {"method": "tinymim"}
    )
    assert weights_file(tmp_path / "s.safetensors").parameters == weights_file(path).parameters
    segmentor = weights_file(made.root / "segmentor/segmentor.pth")
    assert (segmentor.role, segmentor.parameters) == ("segmentor", 26)  # neither auxiliary head nor statistics
    for content in (b"", b"PK\x03\x04", b"\x00" * 100):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(DataError, match="cannot read"):
            read_weights(tmp_path / "broken.pth")


class Evil:
    """Pickles as a call that writes a file."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_joins_by_sha256(made, tmp_path):
    """Teacher -> student -> segmentor -> files, whatever the order; loss, interval and speed only of like with like."""
    result = build_report(made.root, tmp_path / "report.html")
    lineage = result.lineage
    assert [(file.role, file.given) for file in lineage.files] == [
        (role, True) for role in ("teacher", "student", "segmentor", "onnx", "onnx")
    ]
    int8 = lineage.file(sha256_file(made.int8))
    assert [file.role for file in lineage.ancestors(int8)] == ["teacher", "student", "segmentor"]
    assert lineage.reference(int8).sha256 == sha256_file(made.fp32)
    row = next(row for row in lineage.rows() if row.file is int8)
    whole, lossy = (eval_result(made.fp32, wrong)["mIoU"] for wrong in (20, 26))
    assert row.score.loss == pytest.approx(whole - lossy)
    assert row.score.loss_interval == pytest.approx([whole - lossy] * 2)  # both photos are alike
    (place,) = lineage.places()
    base = next(t for t in lineage.times if t.sha256 == sha256_file(made.fp32))
    assert row.times[place].than(base) == (2.5, "2.45 to 2.55")
    assert lineage.file(sha256_file(made.root / "student/student.pth")).data["files"] == 3
    assert json.loads((tmp_path / "lineage.json").read_text())["kind"] == "tinymim.lineage"
    result.print()
    assert "int8" in result.to_markdown()


def test_page_is_self_contained_and_escaped(made, tmp_path):
    build_report(made.root, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)|url\(|@import|<script|https?://""", page)
    assert "<b>tree</b>" not in page
    assert "&lt;b&gt;tree&lt;/b&gt;" in page
    assert "Slow &amp; Old CPU" in page
    assert "/home/" not in page + (tmp_path / "lineage.json").read_text()
    assert len(page) < 120_000
    wanted = ("In short", "2.50", "Speed against quality", "class by class", "3 photos of train, seed 0", "percentile")
    for text in wanted:
        assert text in page, text


def test_missing_links_are_said(made, tmp_path):
    """An .onnx alone: its checkpoint is known by hash only; results that lie beside it and speak of it count."""
    lineage = build_report(made.int8, tmp_path / "report.html").lineage
    assert [(file.name, file.given) for file in lineage.files if file.role == "segmentor"] == [("not given", False)]
    assert len(lineage.scores) == len(lineage.times) == 1
    assert lineage.scores[0].loss is None  # the original was not given
    page = (tmp_path / "report.html").read_text()
    assert "not given" in page
    assert "the file itself was not given" in page
    foreign = tmp_path / "foreign.onnx"
    proto = onnx.load(made.fp32)
    del proto.metadata_props[:]
    onnx.save(proto, foreign)
    lineage = build_report(foreign, tmp_path / "foreign.html").lineage
    assert lineage.files[0].precision is None
    assert "made by another tool" in (tmp_path / "foreign.html").read_text()


def test_changed_weights_are_noticed(made, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("student.pth", "env.json", "config.py"):
        (folder / name).write_bytes((made.root / "student" / name).read_bytes())
    with open(folder / "student.pth", "ab") as file:
        file.write(b"x")
    assert "changed after its run" in read_paths([folder]).files[-1].notes[0]


def test_other_machines_get_columns_of_their_own(made, tmp_path):
    (tmp_path / "other.json").write_text(
        json.dumps(bench_result({made.fp32: 9.0, made.int8: 8.0}, ENV | {"cpu": "New"}))
    )
    result = build_report([made.root, tmp_path / "other.json"], tmp_path / "report.html")
    assert len(result.lineage.places()) == 2
    page = (tmp_path / "report.html").read_text()
    assert "p50 ms (A)" in page
    assert "p50 ms (B)" in page
    assert "do not compare them" in page
    assert page.count('<svg class="scatter"') == 2  # a plot a machine
    cells = {row[-1] for row in result.table()[1:]}
    assert cells == {"", "A", "B"}


def test_scores_of_other_photos_are_not_subtracted(made, tmp_path):
    """Another data set or another mode: no loss, no class table."""
    for change in ({"pixels": 1200}, {"mode": "slide"}):
        lineage = Lineage()
        write_json(tmp_path / "a.json", eval_result(made.fp32, 20))
        write_json(tmp_path / "b.json", eval_result(made.int8, 26, **change))
        for file in ("fp32", "int8"):
            (tmp_path / f"{file}.onnx").write_bytes(getattr(made, file).read_bytes())
        lineage = read_paths([tmp_path / "fp32.onnx", tmp_path / "int8.onnx"])
        assert [score.loss for score in lineage.scores] == [None, None]
        result = compare_reports(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", tmp_path / "compare.html")
        row = next(row for row in result.rows if row.what == "mIoU")
        assert not row.change
        assert row.why_not == "other photos, labels or mode"
    build_report([tmp_path / "fp32.onnx", tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "report.html")
    assert "class by class" not in (tmp_path / "report.html").read_text()


def test_lineage_json_is_read_back(made, tmp_path):
    first = build_report(made.root, tmp_path / "one" / "report.html").lineage
    again = build_report(tmp_path / "one" / "lineage.json", tmp_path / "two" / "report.html").lineage
    assert first.to_dict() == again.to_dict()


def test_photo_rows(made, tmp_path):
    """Two files run on photos; the difference says who was right; labels of other classes are refused."""
    random = np.random.default_rng(0)
    for kind, suffix in (("images", "png"), ("annotations", "png")):
        for split in ("training", "validation"):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = (
                    random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                    if kind == "images"
                    else (random.integers(0, 3, (SIDE, SIDE), np.uint8))
                )
                Image.fromarray(pixels).save(folder / f"{i}.{suffix}")
    write_json(tmp_path / "data/dataset.json", {"classes": CLASSES})
    build_report(made.root, tmp_path / "report.html", data=tmp_path / "data")
    page = (tmp_path / "report.html").read_text()
    assert "What the masks look like" in page
    assert page.count("data:image/") == 2 * 4
    assert len(page) < 400_000
    build_report(made.root, tmp_path / "report.html", data=tmp_path / "data/images/validation")
    assert "data:image/" in (tmp_path / "report.html").read_text()
    write_json(tmp_path / "data/dataset.json", {"classes": [*CLASSES, "car"]})
    with pytest.raises(DataError, match="knows 3 classes"):
        build_report(made.root, tmp_path / "report.html", data=tmp_path / "data")
    with pytest.raises(TinyMIMError, match="nothing to compare"):
        build_report(made.fp32, tmp_path / "report.html", data=tmp_path / "data")


def test_compare(made, tmp_path):
    """Files: sizes, score with a paired interval, time in turns. Runs: settings and curves. Lines: matched by role."""
    result = compare_reports(made.fp32, made.int8, tmp_path / "c.html")
    told = {row.what: row for row in result.rows}
    assert told["p50 ms"].change == "2.50 times as fast (2.45 to 2.55)"
    assert told["p50 ms"].tone == "good"
    assert told["mIoU"].tone == "bad"
    assert told["mIoU"].change.startswith("-1.24 points")
    page = (tmp_path / "c.html").read_text()
    assert "Class by class" in page
    assert not re.search(r"https?://", page)
    assert json.loads((tmp_path / "c.json").read_text())["kind"] == "tinymim.difference"
    assert "2.50 times as fast" in result.to_markdown()
    runs = compare_reports(made.root / "teacher", made.root / "student", tmp_path / "runs.html")
    assert {"of": "teacher", "key": "method", "a": "'mae'", "b": "'tinymim'"} in runs.settings
    assert "How they learned" in (tmp_path / "runs.html").read_text()
    build_report(made.root, tmp_path / "lineage" / "report.html")
    lines = compare_reports(tmp_path / "lineage/lineage.json", made.root, tmp_path / "lines.html")
    assert {row.change for row in lines.rows if row.what == "sha256"} == {"the same file"}
    lines.print()


def test_other_results(made, tmp_path):
    """Tuner, sensitivity, model comparison and demo: each is read, joined and shown."""
    from tinymim_export.precision.sensitivity import SensitivityResult, SensitivityRow
    from tinymim_export.tune.result import TuneResult
    from tinymim_export.tune.verdict import BASELINE, PROMOTED, Budget, Candidate

    fp32, int8 = sha256_file(made.fp32), sha256_file(made.int8)
    shared = dict(
        graph=[],
        runtime="onnxruntime",
        provider="cpu",
        arithmetic=None,
        engine="onnxruntime cpu",
        file_mib=1.0,
        shape=(1, 3, SIDE, SIDE),
        threads=2,
        runs=9,
        p90_ms=1.0,
        gain=None,
        steady=True,
        mIoU_interval=(0.1, 0.9),
        images=2,
        mode="whole",
        data="photos",
    )
    original, winner = (
        Candidate(
            name=name,
            precision=name,
            file=f"{name}.onnx",
            sha256=sha,
            p50_ms=ms,
            p50_interval=(ms, ms),
            original_ms=40.0,
            speed_up=(40 / ms, 39 / ms, 41 / ms),
            mIoU=miou,
            drop=0.5 - miou,
            drop_interval=(0.5 - miou,) * 2,
            verdict=word,
            reasons=reasons,
            class_IoU=dict.fromkeys(CLASSES, miou),
            **shared,
        )
        for name, sha, ms, miou, word, reasons in (
            ("fp32", fp32, 40.0, 0.5, BASELINE, []),
            ("int8", int8, 10.0, 0.498, PROMOTED, ["4 times as fast"]),
        )
    )
    folder = tmp_path / "tuned"
    folder.mkdir()
    tuned = TuneResult(
        "x.onnx", "x.tune", winner, [original, winner], [("cuda", "absent")], Budget(), {}, ENV, "because"
    )
    tuned.onnx_sha256 = "f" * 64
    tuned.to_json(folder / "tune.json")
    rows = [SensitivityRow(f"block {i}", 2, 0.4, 0.01 * i, 0.99, {"road": 0.02}, "e" * 64) for i in range(3)]
    SensitivityResult("fp32.onnx", fp32, "int8", 0.5, 2, "photos", None, rows).to_json(folder / "sensitivity.json")
    for path in (made.fp32, made.int8):
        (folder / path.name).write_bytes(path.read_bytes())
    result = build_report(folder, folder / "report.html")
    losses = {score.sha256: score.loss for score in result.lineage.scores}
    assert losses == {fp32: None, int8: pytest.approx(0.002), "f" * 64: pytest.approx(0.002)}
    assert len({score.data for score in result.lineage.scores}) == 1
    page = (folder / "report.html").read_text()
    for text in (
        "Tuning chose int8 on onnxruntime cpu",
        "4.00",
        "3.90 to 4.10",
        "4 times as fast",
        "left out",
        "Which blocks suffer",
        "block 2",
        "-2.00",
        "road -2.0",
    ):
        assert text in page, text
    write_json(folder / "scores" / "a.json", eval_result(made.fp32, 20))
    write_json(folder / "scores" / "b.json", eval_result(made.int8, 26))
    lineage = build_report(folder, folder / "report.html").lineage  # full scores are better than summed-up ones
    assert {round(score.loss, 4) for score in lineage.scores if score.loss is not None} == {0.0124}

    score = eval_result(made.fp32, 20)
    del score["confusion"]
    models = {"ours": {"0": {"score": score}}, "other": {"0": {}}}
    write_json(
        tmp_path / "compare.json",
        {"kind": "tinymim.compare", "models": models, "measure": bench_result({made.fp32: 7.0})},
    )
    demo = {
        "settings": {},
        "environment": ENV,
        "stages": {"measure": {"rows": bench_result({made.int8: 3.0})["rows"], "onnx": {"mIoU": 0.3, "images": 2}}},
    }
    write_json(tmp_path / "demo.json", demo)
    lineage = read_paths([made.fp32, tmp_path / "compare.json", tmp_path / "demo.json"])
    assert {(t.sha256, t.p50_ms) for t in lineage.times} == {(fp32, 7.0), (int8, 3.0)}
    assert [(s.sha256, s.data is None) for s in lineage.scores] == [(fp32, False), (int8, True)]  # one data set


def test_settings_are_flat_and_travel():
    text = 'a = dict(b=1)\nc = {"d": {"e": [1, "/home/me/x.pth"]}}\nf = g(1)\n'
    assert flat_settings(text) == {"a": "'dict(b=1)'", "c.d.e": "[1, '.../x.pth']", "f": "'g(1)'"}
    assert flat_settings("not python (") == {}


def test_a_student_of_several_teachers_names_them_all(tmp_path):
    torch.manual_seed(0)
    shas = ["1" * 64, "2" * 64]
    folder = tmp_path / "several"
    folder.mkdir()
    given = [{"file": f"teacher{i}.pth", "sha256": sha} for i, sha in enumerate(shas)]
    write_env(folder, {"teacher": [*given, given[0]]})  # as a list, one of them twice
    meta = {"method": "tinymim", "teacher_sha256": " + ".join([*shas, shas[0]])}
    save_student(ViT(img_size=32, embed_dim=12, depth=1, num_heads=2), folder / "student.pth", meta)
    lineage = build_report(folder, tmp_path / "report.html").lineage
    assert [(file.name, file.role) for file in lineage.files] == [
        ("teacher0.pth", "teacher"),
        ("teacher1.pth", "teacher"),
        ("several/student.pth", "student"),
    ]
    student = lineage.files[2]
    assert student.parents == {"teacher": shas[0], "teacher 2": shas[1]}
    (folder / "env.json").unlink()  # the file itself names them, too
    lineage = build_report(folder, tmp_path / "report.html").lineage
    assert [(file.role, file.given) for file in lineage.files] == [("teacher", False)] * 2 + [("student", True)]


def test_env_json_keeps_what_a_resume_does_not_say(tmp_path):
    write_env(tmp_path, {"student": {"file": "s.pth", "sha256": "1"}, "data": {"files": 1}})
    write_env(tmp_path, {"student": None, "data": {"files": 1}})
    told = json.loads((tmp_path / "env.json").read_text())
    assert told["inputs"]["student"]["sha256"] == "1"
    assert "earlier" not in told
    write_env(tmp_path, {"student": None, "data": {"files": 2}})
    assert json.loads((tmp_path / "env.json").read_text())["earlier"][0]["inputs"]["data"] == {"files": 1}
    assert told["cpu"] == environment()["cpu"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "[1, 2]", "is not a result of tinymim"),
        ("x.json", '{"kind": "tinymim.magic"}', "is not a result of tinymim"),
        ("x.json", '{"kind": "tinymim.bench", "rows": [{}], "environment": {}}', "rows[0] has no 'file'"),
        ("x.onnx", "no graph", "not a usable .onnx file"),
        ("x.txt", "", "a report cannot be made from"),
        ("x.pth", "", "cannot read"),
    ],
)
def test_bad_files(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "report.html")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_student_of_a_method_without_a_teacher_is_a_student(tmp_path):
    torch.manual_seed(0)
    save_student(ViT(img_size=32, embed_dim=12, depth=1, num_heads=2), tmp_path / "student.pth", {"method": "mine"})
    for verb, role in (("distill", "student"), ("pretrain", "teacher")):
        older = f'"""Resolved recipe of this run (tinymim {verb} --data photos)."""'
        for head in (
            older,
            f'"""Resolved recipe of this run."""\n\n# command: {["tinymim", verb, "--data", "photos"]!r}',
        ):
            (tmp_path / "config.py").write_text(f"{head}\nmethod = 'mine'\n")
            (found,) = read_paths([tmp_path]).files
            assert (found.role, found.command) == (role, f"tinymim {verb} --data photos")


def test_parts_that_do_not_fit_together(made, tmp_path, capsys):
    good = eval_result(made.fp32, 0)
    photos = good["photos"]
    for change in (
        {"mIoU": None},
        {"images": 3},
        {"photos": photos | {"names": ["a"]}},
        {"photos": photos | {"right": [[1], [1, 2]]}},
        {"photos": photos | {"predicted": photos["predicted"][:1]}},
    ):
        write_json(tmp_path / "a.json", good | change)
        assert main(["report", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.html")]) == 2, change
        assert "a.json" in capsys.readouterr().err


def test_damaged_files_beside_good_ones_are_named(made, tmp_path, capsys):
    """A page is made of the rest; a file that was named itself is an error."""
    folder = tmp_path / "all"
    shutil.copytree(made.root, folder)
    (folder / "student" / "env.json").write_text('{"inputs": {"data": 5}}')
    (folder / "bad.json").write_text('{"kind": "tinymim.eval", "sha256": "x", "engine": "e", "mIoU": "high"}')
    (folder / "bad.onnx").write_bytes(b"junk")
    assert main(["report", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    for words in ("inputs.data is 5, expected an object or null", "mIoU is &#x27;high&#x27;", "left out: bad.onnx"):
        assert words in page
    for name in ("student", "bad.json", "bad.onnx"):
        assert main(["report", str(folder / name), "--out", str(tmp_path / "b.html")]) == 2
    assert not (tmp_path / "b.html").exists()


def test_verb(made, tmp_path, capsys, monkeypatch):
    """Two of a kind are compared, --line joins them, anything else is a lineage; bad options say what to type."""
    monkeypatch.chdir(tmp_path)
    assert [kind_of(made.root / name) for name in ("teacher", "student", "segmentor", "int8.onnx", "")] == [
        "teacher",
        "student",
        "segmentor",
        "onnx",
        "lineage",
    ]
    both = [str(made.fp32), str(made.int8)]
    assert main(["report", *both]) == 0
    assert (tmp_path / "compare.html").is_file()
    assert "next: tinymim report" in capsys.readouterr().out
    assert main(["report", *both, "--line"]) == 0
    assert main(["report", str(made.root / "student"), str(made.root / "segmentor"), "--out", "runs.html"]) == 0
    assert (tmp_path / "lineage.json").is_file()
    assert "next: " in capsys.readouterr().out
    for folder in ("photos", "files", "empty"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "photos" / "a.png")
    alone = [str(shutil.copy(path, tmp_path / "files")) for path in both]
    assert main(["report", *alone, "--line", "--data", "photos"]) == 0
    assert "--data photos --json" in capsys.readouterr().out
    for args, words in (
        ([], "nothing to report on"),
        (["absent"], "nothing at absent"),
        (["empty"], "holds nothing"),
        ([*both, "--data", "empty"], "does not work with a comparison"),
        ([str(made.root), "--data", "empty"], "no photos in empty"),
        ([*both, "--line", "--out", "page.txt"], "is not an .html file"),
    ):
        assert main(["report", *args]) == 2, args
        assert words in capsys.readouterr().err


def test_command_needs_no_torch(made, tmp_path):
    """The command, with torch, timm, MMSegmentation and onnx made impossible to import."""
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'mmengine', 'mmseg', 'mmcv', 'onnx'): sys.modules[name] = None\n"
        "from tinymim.cli import main\n"
        f"sys.exit(main(['report', {str(made.root)!r}, '--out', {str(tmp_path / 'report.html')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "segmentor/segmentor.pth" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000


POINT = st.builds(
    ScatterPoint,
    name=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=24),
    x=st.floats(0.5, 5000),
    y=st.floats(0, 100),
    mark=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(POINT, min_size=1, max_size=14))
def test_scatter_labels_never_collide(points):
    """No label on another or on a dot, all inside the frame; the front is what no point beats."""
    svg = scatter("plot", points, "ms", "mIoU")
    boxes = []
    for x, y, width in re.findall(r'<text class="name[^"]*" x="([-\d.]+)" y="([-\d.]+)" textLength="([\d.]+)"', svg):
        boxes.append((float(x), float(y) - 11, float(x) + float(width), float(y) + 4))
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 820
        assert not any(a[0] < b[2] - 0.2 and b[0] < a[2] - 0.2 and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
    front = pareto_front(points)
    for p in points:
        beaten = any((q.x <= p.x and q.y >= p.y) and (q.x, q.y) != (p.x, p.y) for q in points)
        assert beaten != any((q.x, q.y) == (p.x, p.y) for q in front)


def test_figures():
    assert scatter("empty", [ScatterPoint("a", float("nan"), 1.0)], "x", "y") == ""
    assert "<i>" not in scatter("<i>", [ScatterPoint("<i>", 1.0, 1.0)], "<i>", "<i>").replace("<i style", "")
    assert bars("none", []) == ""
    assert bars("t", [("a", 1.0, "x"), ("b", -1.0, "y")]).count("<i style") == 2
    assert class_losses([("int8", {"a": 0.5})], {"a": None}) == ""
    table = class_losses([("int8", {"a": 0.5, "b": None})], {"a": 0.6, "b": 0.2})
    assert "-10.0" in table
    assert "absent" in table
    photo = np.full((1, 4, 3), 200, np.uint8)
    first, second, truth = (np.array([row], np.uint8) for row in ([0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 2]))
    picture = difference_image(photo, first, second, truth)[0]
    assert [tuple(map(int, pixel)) for pixel in picture[1:]] == [WORSE, BETTER, OTHER]
    assert tuple(difference_image(photo, first, second)[0, 1]) == OTHER
    assert picture[0].min() > 200  # faded
