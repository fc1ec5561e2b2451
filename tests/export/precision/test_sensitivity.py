"""Block by block: a spoiled block is found, excluded, and a budget that cannot hold is refused with the figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.export.conftest import CLASSES
from tests.export.photographs import write_labelled, write_photos
from tinymim.errors import CheckFailed, ConfigError
from tinymim_export import main
from tinymim_export.precision.blocks import blocks_of
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.quantize import FloatFile
from tinymim_export.precision.sensitivity import quantize_within, sensitivity
from tinymim_export.runtime.metadata import load_proto, proto_metadata, save_proto, write_metadata
from tinymim_export.runtime.predictor import Predictor
from tinymim_export.tune.targets import milliseconds

SPOILED = "block 3"


def spoil(proto, block):
    """One channel behind each normalisation of a block 1000 times as large, its weights as much smaller: the same
    function in float, outliers that take all the levels in INT8."""
    inside = set(blocks_of(proto)[block])
    g = Graph(proto)
    for norm in [node for node in g.graph.node if node.name in inside and node.op_type == "LayerNormalization"]:
        (product,) = g.users[norm.output[0]]
        for at, node, name, factor in ((1, norm, "scale", 1e3), (2, norm, "shift", 1e3), (1, product, "weight", 1e-3)):
            value = g.constant(node.input[at]).copy()
            value[0] *= np.float32(factor)
            node.input[at] = g.add_constant(f"spoiled_{name}", value)
    return proto


@pytest.fixture(scope="module")
def case(exported, tmp_path_factory):
    """A spoiled FP32 file, and photos labelled with what it says (so it scores 100 %)."""
    folder = tmp_path_factory.mktemp("sensitivity")
    proto = load_proto(exported.fixed.onnx)
    write_metadata(proto, {"resize": {"scale": [96, 64], "keep_ratio": False, "mode": "whole"}})
    save_proto(spoil(proto, SPOILED), folder / "fp32.onnx")
    predictor = Predictor(folder / "fp32.onnx")
    return folder / "fp32.onnx", write_labelled(folder / "data", CLASSES, predictor.mask)


@pytest.fixture(scope="module")
def source(case):
    made = FloatFile(case[0])
    made.calibrate(case[1], 6, 0)
    return made


@pytest.mark.slow
def test_the_spoiled_block_is_found(case, source, tmp_path, capsys):
    file, data = case
    result = sensitivity(file, data, count=6, method="minmax", source=source)
    assert [row.block for row in result.rows] == ["block 1", "block 2", "block 3", "block 4", "head", "all"]
    assert result.miou == 1.0
    worst = result.worst()
    assert worst[0].block == SPOILED
    assert worst[0].drop > 2 * max(worst[1].drop, 0)
    assert worst[0].equal_pixels < min(row.equal_pixels for row in worst[1:])
    assert list(worst[0].class_drop.values()) == sorted(worst[0].class_drop.values(), reverse=True)
    assert result.rows[0].layers == 4
    result.print()
    assert SPOILED in capsys.readouterr().out
    value = json.loads(result.to_json(tmp_path / "s.json"))
    assert value["kind"] == "tinymim.sensitivity"
    assert value["calibration"]["count"] == 6
    assert "| block 3 | 4 |" in result.to_markdown()


@pytest.mark.slow
def test_exclusion_starts_with_the_worst_and_stops_at_the_budget(case, tmp_path, capsys):
    file, data = case
    made = quantize_within(file, tmp_path / "out.onnx", data=data, max_miou_drop=0.2, count=6, method="minmax")
    assert [step["excluded"] for step in made.steps] == [[], [SPOILED]]
    assert made.steps[1]["drop"] <= 0.2 < made.steps[0]["drop"]
    assert made.excluded == proto_metadata(load_proto(made.file))["precision"]["excluded"] == [SPOILED]
    assert "int8 without block 3" in capsys.readouterr().out


@pytest.mark.slow
def test_an_impossible_budget_is_refused_with_the_figures(case, tmp_path):
    file, data = case
    with pytest.raises(CheckFailed, match=r"no choice of blocks keeps int8 within -100 points.*\n.*lost without block"):
        quantize_within(file, tmp_path / "out.onnx", data=data, max_miou_drop=-1, count=6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_is_not_made_block_by_block(case):
    with pytest.raises(ConfigError, match="fp16 is not applied per block"):
        sensitivity(*case, precision="fp16")


# the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_writes_a_precision_from_a_file_without_pytorch(case, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    write_photos(photos, 3)
    out, told = tmp_path / "int8.onnx", tmp_path / "r.json"
    argv = [
        "--from",
        str(case[0]),
        "--onnx",
        str(out),
        "--precision",
        "int8",
        "--calibration",
        str(photos),
        "--calibration-count",
        "3",
        "--graph",
        "attention",
        "--exclude-blocks",
        SPOILED,
        "--json",
        str(told),
    ]
    code = f"import sys; from tinymim_export.cli import main; print(main({argv!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["0", "False"], done.stdout + done.stderr
    assert f"next: tinymim bench {case[0]} {out}" in done.stdout
    assert "blocks left in float: block 3" in done.stdout
    value = json.loads(told.read_text())
    assert (value["precision"], value["graph"], value["excluded"]) == ("int8", ["attention"], ["block 3"])
    assert main(["--verify-only", str(out), "--from", str(case[0])]) == 0


@pytest.mark.slow
def test_command_exports_and_quantises_in_one_go(files, tmp_path, capsys):
    out = tmp_path / "w.onnx"
    options = [
        "--precision",
        "int8-weights",
        "--size",
        "32",
        "48",
        "--part",
        "backbone",
        "--markdown",
        str(tmp_path / "r.md"),
    ]
    assert main(["--checkpoint", str(files.student), "--onnx", str(out), *options]) == 0
    meta = proto_metadata(load_proto(out))
    assert meta["precision"]["name"] == "int8-weights"
    assert meta["verified"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"w.onnx", "r.md"}
    assert "next: tinymim bench" in capsys.readouterr().out


@pytest.mark.slow
def test_command_prints_sensitivity(case, tmp_path, capsys):
    argv = [
        "--from",
        str(case[0]),
        "--sensitivity",
        "--data",
        str(case[1]),
        "--limit",
        "2",
        "--precision",
        "int8-dynamic",
    ]
    assert main([*argv, "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    assert "classes that lose most" in out
    assert "next: tinymim-export --from" in out
    assert "--max-miou-drop 0.5" in out
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "nothing to start from"),
        (["--from", "a.onnx", "--checkpoint", "b.pth", "--onnx", "c"], "exclude each other"),
        (["--checkpoint", "b.pth"], "--onnx is missing"),
        (["--from", "a.onnx", "--onnx", "c"], "is FP32 already"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "bf16"], "--runtime openvino --precision bf16"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "int2"], "int2"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--size", "3", "3"], "--size and --from exclude"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--dynamic"], "--dynamic and --from exclude"),
        (
            ["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--calibration", "x"],
            "--calibration does nothing",
        ),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--data", "x"], "--data does nothing here"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "int8", "--max-miou-drop", "1"], "--data is missing"),
        (["--from", "a.onnx", "--onnx", "c", "--max-miou-drop", "1", "--data", "x"], "needs an INT8 precision"),
        (["--from", "a.onnx", "--sensitivity"], "--data is missing"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--limit", "3"], "without --data"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "fp16", "--runtimes", "openvino"], "belong to --tune"),
        (["--from", "a.onnx", "--onnx", "c", "--tune", "--data", "x", "--precision", "int8"], "by itself"),
        (["--from", "a.onnx", "--onnx", "c", "--tune", "--data", "x", "--latency-budget", "soon"], "is not a time"),
        (["--from", "a.onnx", "--onnx", "c", "--ort-web", "x", "--precision", "fp16"], "without --web"),
        (["--checkpoint", "a.pth", "--onnx", "c", "--opset", "30"], "18 to 23"),
        (["--checkpoint", "a.onnx", "--onnx", "c"], "start there with --from"),
        (["--from", "a.onnx", "--sensitivity", "--data", "x", "--web", "c"], "writes no file"),
        (["--from", "a.onnx", "--precision", "int8-weights", "--web", "c"], "--onnx is missing"),
        (["--from", "a.onnx", "--verify-only", "b.onnx", "--precision", "fp16"], "exports nothing"),
        (["--from", "a.onnx", "--onnx", "c", "--precision", "int8", "--max-miou-drop", "-1", "--data", "x"], "below 0"),
        (["--from", "none.onnx", "--onnx", "c", "--precision", "fp16"], "no file at none.onnx"),
    ],
)
def test_options_that_do_not_belong_together(argv, words, capsys):
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "fix:" in told
    assert not Path("c").exists()


@pytest.mark.parametrize(("text", "ms"), [("100", 100), ("100ms", 100), (" 0.1s ", 100), ("12.5 MS", 12.5)])
def test_latency_budgets(text, ms):
    assert milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "-3ms", "0", "nan", "inf", "100us", "fast"])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError, match="is not a time"):
        milliseconds(text)
