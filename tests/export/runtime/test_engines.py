"""Engines on real small files: the same pixels everywhere, sizes, clear refusals; profiles, pairs, CPU features."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.export.tiny import HEIGHT, WIDTH, segmentor_proto, write_labelled, write_segmentor
from tinymim.errors import ConfigError, DataError
from tinymim_export.bench.explain import cpu_features, facts, machine, top_operators, unfused_pairs
from tinymim_export.precision.variants import apply_variants
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import save_proto

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
SHAPE = (1, 3, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_segmentor(tmp_path_factory.mktemp("runtime") / "tiny.onnx")


def noise(shape=SHAPE):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_openvino_gives_the_same_logits(file):
    ours = open_engine(file, threads=1).run(noise())
    theirs = open_engine(file, runtime="openvino", threads=1)
    assert theirs.label == "openvino cpu f32"
    assert theirs.sha256 == open_engine(file).sha256
    assert theirs.meta["classes"] == ["red", "green", "blue"]
    np.testing.assert_allclose(theirs.run(noise()), ours, atol=1e-4 * np.abs(ours).max())
    np.testing.assert_allclose(theirs.run(noise((3, *SHAPE[1:])))[:1], ours, atol=1, rtol=1)  # another batch
    assert theirs.timer(SHAPE)() > 0


@pytest.mark.skipif(not BF16, reason="this processor has no bfloat16")
def test_bf16_is_another_arithmetic_on_the_same_file(file):
    exact, coarse = (open_engine(file, runtime="openvino", precision=p, threads=1) for p in ("f32", "bf16"))
    a, b = exact.run(noise()), coarse.run(noise())
    assert coarse.label == "openvino cpu bf16"
    assert not np.array_equal(a, b)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999


def test_bf16_is_refused_where_it_would_be_emulated(file, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(ConfigError, match="no bfloat16 arithmetic"):
        open_engine(file, runtime="openvino", precision="bf16")


def test_missing_openvino_names_the_extra(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r'pip install "tinymim\[openvino\]"'):
        open_engine(file, runtime="openvino")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(runtime="tvm"), "runtime 'tvm' is unknown"),
        (dict(provider="npu"), "provider 'npu' is unknown"),
        (dict(precision="bf16"), "setting of OpenVINO"),
        (dict(runtime="openvino", precision="int4"), "precision 'int4' is unknown"),
        (dict(runtime="openvino", provider="cuda"), "OpenVINO has no provider"),
        (dict(provider="tensorrt"), "no TensorrtExecutionProvider"),
        (dict(threads=0), "--threads 0 is not possible"),
    ],
)
def test_what_is_not_here_is_refused(file, options, words):
    if options.get("provider") == "tensorrt" and "TensorrtExecutionProvider" in ort.get_available_providers():
        pytest.skip("TensorRT is here")
    with pytest.raises(ConfigError, match=words):
        open_engine(file, **options)


@pytest.mark.parametrize("options", [{}, {"runtime": "openvino"}])
def test_sizes(file, tmp_path, options):
    engine = open_engine(file, threads=1, **options)
    assert engine.size == (HEIGHT, WIDTH)
    assert engine.shape(2) == (2, 3, HEIGHT, WIDTH)
    with pytest.raises(ConfigError, match="fixed width of 96, not 64"):
        engine.shape(1, (64, 64))
    with pytest.raises(ConfigError, match="its height and width are 64x96"):
        engine.run(noise((1, 3, 64, 64)))
    free = open_engine(write_segmentor(tmp_path / "free.onnx", free=True), threads=1, **options)
    assert free.size == (None, None)
    assert free.shape() == SHAPE  # of its export
    assert free.run(noise((1, 3, 32, 40))).shape == (1, 3, 32, 40)
    assert free.run(noise((2, 3, 48, 40))).shape == (2, 3, 48, 40)
    with pytest.raises(ConfigError, match="height 0"):
        free.shape(1, (0, 8))


def test_pixels_go_in_as_uint8(tmp_path):
    save_proto(apply_variants(segmentor_proto(), ["pixels"]), tmp_path / "pixels.onnx")
    engine = open_engine(tmp_path / "pixels.onnx", threads=1)
    assert engine.dtype == np.uint8
    assert engine.timer(SHAPE)() > 0
    assert top_operators(engine, SHAPE)


@pytest.mark.parametrize("change", ["opset", "ir", "operator"])
def test_a_file_for_a_newer_runtime_is_not_called_damaged(tmp_path, change):
    proto = segmentor_proto()
    if change == "opset":
        proto.opset_import[0].version = 99
    elif change == "ir":
        proto.ir_version = 99
    else:
        proto.graph.node[1].op_type = "ReluOfTomorrow"
    (tmp_path / "new.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError) as caught:
        open_engine(tmp_path / "new.onnx")
    assert "needs more than onnxruntime" in caught.value.what
    assert {"opset": "99", "ir": "99", "operator": "ReluOfTomorrow"}[change] in caught.value.why
    assert "--opset 20" in caught.value.fix


def test_damaged_and_foreign_files(tmp_path, file):
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:500])
    for options in ({}, {"runtime": "openvino"}):
        with pytest.raises(DataError, match="is not a usable"):
            open_engine(tmp_path / "cut.onnx", **options)
        with pytest.raises(DataError, match="no file at"):
            open_engine(tmp_path / "none.onnx", **options)
    proto = segmentor_proto()
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["image"], ["float"], to=1))
    proto.graph.node[1].input[0] = "float"
    (tmp_path / "ids.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match="does not take one image batch"):
        open_engine(tmp_path / "ids.onnx")


def test_an_operator_openvino_lacks_is_named(tmp_path):
    """Contrib operators of ONNX Runtime: the file is fine, OpenVINO cannot run it."""
    proto = segmentor_proto()
    node = onnx.helper.make_node("SampleOp", ["r1"], ["odd"], domain="com.microsoft")
    proto.graph.node.insert(2, node)
    proto.graph.node[3].input[0] = "odd"
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    (tmp_path / "contrib.onnx").write_bytes(proto.SerializeToString())
    engine = open_engine(tmp_path / "contrib.onnx", runtime="openvino")
    with pytest.raises(ConfigError, match=r"OpenVINO cannot run contrib\.onnx") as caught:
        engine.timer(SHAPE)
    assert "SampleOp" in caught.value.why
    assert open_engine(tmp_path / "contrib.onnx").timer(SHAPE)() > 0


@pytest.mark.parametrize("options", [{}, {"runtime": "openvino"}])
def test_top_operators(file, options):
    engine = open_engine(file, threads=1, **options)
    top = top_operators(engine, SHAPE, n=20, runs=2)
    assert sum(row.share for row in top) == pytest.approx(1)
    assert [row.ms for row in top] == sorted((row.ms for row in top), reverse=True)
    assert any("Conv" in row.operator for row in top)
    assert len(top_operators(engine, SHAPE, n=1, runs=1)) == 1


def test_profile_counts_only_the_asked_runs(file):
    from tinymim_export.runtime.sessions import profile

    once = profile(Path(file), "cpu", 1, SHAPE, runs=1)
    thrice = profile(Path(file), "cpu", 1, SHAPE, runs=3)
    assert len(thrice) == 3 * len(once)


def test_unfused_pairs(tmp_path, file):
    """INT8 as our quantiser writes it leaves no pair; a pair around an operator without an INT8 kernel stays."""
    from tinymim_export.precision.quantize import quantize

    assert unfused_pairs(open_engine(file, threads=1)) == 0
    photos = write_labelled(tmp_path / "data")
    quantize(file, tmp_path / "int8.onnx", precision="int8", calibration=photos, count=4)
    assert unfused_pairs(open_engine(tmp_path / "int8.onnx", threads=1)) == 0
    proto = onnx.load(tmp_path / "int8.onnx")
    scale, zero = (
        onnx.numpy_helper.from_array(value, name)
        for value, name in ((np.float32(0.1), "odd_scale"), (np.uint8(128), "odd_zero"))
    )
    proto.graph.initializer.extend([scale, zero])
    last = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "Resize")
    source = proto.graph.node[last].input[0]
    for i, (kind, given, made) in enumerate(
        (("Sin", source, "s"), ("QuantizeLinear", "s", "q"), ("DequantizeLinear", "q", "dq"), ("Sin", "dq", "end"))
    ):
        inputs = [given, "odd_scale", "odd_zero"] if "Linear" in kind else [given]
        proto.graph.node.insert(last + i, onnx.helper.make_node(kind, inputs, [made], name=made))
    proto.graph.node[last + 4].input[0] = "end"
    save_proto(proto, tmp_path / "pair.onnx")
    assert unfused_pairs(open_engine(tmp_path / "pair.onnx", threads=1)) == 1


def test_cpu_features_are_read_not_guessed():
    flags = "flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 amx_tile"
    assert cpu_features(f"processor: 0\n{flags}\n") == {
        "AVX2": True,
        "AVX512": True,
        "VNNI": True,
        "AVX512-BF16": False,
        "AMX-INT8": True,
        "AMX-BF16": False,
    }
    assert cpu_features("flags : avx_vnni")["VNNI"]
    assert cpu_features("Features : fp asimd asimddp") is None  # another processor: unknown, not absent
    assert cpu_features("") is None


def test_facts_and_stamp_are_plain_values(file):
    import json

    engine = open_engine(file, threads=1)
    known = facts(engine, SHAPE)
    assert json.loads(json.dumps(known)) == known
    assert list(known["nodes"]) == ["CPUExecutionProvider"]
    assert known["unfused_pairs"] == 0
    assert {"cpu", "cores", "platform", "cpu_features", "versions"} <= machine().keys()


def test_signals_still_arrive_after_engines_were_dropped(file):
    """OpenVINO puts a signal stack back when a core dies; two cores would leave the thread a freed one."""
    code = (
        "import gc, signal, subprocess, sys\n"
        "from tinymim_export.runtime.engines import open_engine\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "engines = [open_engine(sys.argv[1], runtime='openvino', threads=1) for _ in range(3)]\n"
        "[engine.timer((1, 3, 64, 96))() for engine in engines]\n"
        "del engines[0]; gc.collect(); engines.clear(); gc.collect()\n"
        "[subprocess.run(['true']) for _ in range(20)]\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
