"""Precisions: what is in INT8 and what is not, real fused kernels, honest comparison, metadata, refusals."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from tests.export.photographs import write_photos
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.files import sha256_file
from tinymim_export.bench.graph_parts import cut
from tinymim_export.graph.parity import verify
from tinymim_export.precision import PRECISIONS, Tolerance
from tinymim_export.precision.blocks import blocks_of
from tinymim_export.precision.fp16 import to_half
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import WEIGHT_BITS, activation_scale, quantise_weight
from tinymim_export.precision.quantize import FloatFile, quantize, verify_file
from tinymim_export.precision.variants import apply_variants
from tinymim_export.runtime.metadata import load_proto, mark, proto_metadata, save_proto, write_metadata
from tinymim_export.runtime.predictor import Predictor

WHOLE = {"resize": {"scale": [96, 64], "keep_ratio": False, "mode": "whole"}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def made(exported, photos, tmp_path_factory):
    """Every precision of the tiny segmentor, and the FP32 file they come from."""
    folder = tmp_path_factory.mktemp("precisions")
    proto = load_proto(exported.fixed.onnx)
    write_metadata(proto, WHOLE)
    mark(proto, proto_metadata(proto)["parity"])  # another contract than the one that was verified
    save_proto(proto, folder / "fp32.onnx")
    out = {"fp32": folder / "fp32.onnx"}
    for precision in ("fp16", "int8-dynamic", "int8-weights"):
        out[precision] = quantize(out["fp32"], folder / f"{precision}.onnx", precision=precision, photos=photos)
    source = FloatFile(out["fp32"])
    source.calibrate(photos, 6, 0)
    out["source"] = source
    out["int8"] = quantize(
        out["fp32"], folder / "int8.onnx", precision="int8", calibration=photos, count=6, source=source
    )
    fused = dict(calibration=photos, count=6, graph=["attention", "pixels"])
    out["fused"] = quantize(out["fp32"], folder / "fused.onnx", precision="int8", **fused)
    return out


def kinds(path, optimised=None):
    """Operators of a file, or of what ONNX Runtime makes of it."""
    if optimised is not None:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimised / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = optimised / "optimised.onnx"
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


# the arithmetic ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(-100, 100, width=32)),
    st.integers(0, 1),
    st.sampled_from([7, 8]),
)
def test_weights_are_off_by_half_a_step_at_most(weight, axis, bits):
    levels, scale = quantise_weight(weight, axis, bits)
    assert levels.dtype == np.int8
    assert scale.shape == (weight.shape[axis],)
    assert np.abs(levels.astype(int)).max() <= 2 ** (bits - 1) - 1
    steps = scale[:, None] if axis == 0 else scale[None]
    assert (np.abs(levels * steps - weight) <= steps * 0.5001 + 1e-6).all()


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_activation_levels_hit_zero_and_reach_the_ends(a, b):
    low, high = min(a, b), max(a, b)
    scale, zero = activation_scale(low, high)
    assert 0 <= int(zero) <= 255
    assert (0 - int(zero)) * scale <= min(low, 0) + scale
    assert (255 - int(zero)) * scale >= max(high, 0) - scale


def test_two_products_never_overflow_16_bits():
    assert 2 * 255 * (2 ** (WEIGHT_BITS - 1) - 1) <= 2**15 - 1


# static INT8 ------------------------------------------------------------------------------------------------------


def test_pairs_stand_around_the_right_nodes(made):
    g = Graph(load_proto(made["int8"].file))
    float_kinds = {"Softmax", "LayerNormalization", "ConvTranspose", "Resize", "ArgMax"}
    quantised = Counter()
    for node in g.graph.node:
        makers = [g.maker.get(name) for name in node.input]
        weight = makers[1] if len(makers) > 1 else None
        if weight is not None and weight.op_type == "DequantizeLinear" and node.op_type in ("Conv", "MatMul"):
            quantised[node.op_type] += 1
            assert makers[0].op_type == "DequantizeLinear"
            levels, scale = (g.constant(name) for name in weight.input[:2])
            axis = 0 if node.op_type == "Conv" else 1
            assert levels.dtype == np.int8
            assert scale.shape == (levels.shape[axis],), "one scale a channel"
            assert next(a.i for a in weight.attribute if a.name == "axis") == axis
            if node.op_type == "Conv":
                if len(node.input) > 2:
                    assert g.constant(makers[2].input[0]).dtype == np.int32
                users = g.users[node.output[0]]
                users = g.users[users[0].output[0]] if users[0].op_type == "Relu" else users
                assert [user.op_type for user in users] == ["QuantizeLinear"]
            else:
                assert "QuantizeLinear" not in [user.op_type for user in g.users[node.output[0]]], "result stays float"
        elif node.op_type in float_kinds:
            assert not [m for m in makers if m is not None and m.op_type == "DequantizeLinear" and "weight" in m.name]
    assert quantised == Counter(made["int8"].layers)
    assert quantised["MatMul"] == 16, "four linear layers a block"
    last = next(node for node in g.graph.node if "scores" in node.output)
    assert g.maker.get(last.input[1]) is None, "the last convolution stays in float"
    first = next(node for node in g.graph.node if node.input[0] == "image" and node.op_type == "Conv")
    assert g.maker.get(first.input[1]) is None, "so does the first"


def test_onnxruntime_runs_integer_kernels(made, tmp_path):
    for name, products in (("int8", 16), ("fused", 24)):  # fused: q, k and v of four blocks are products of their own
        left = kinds(made[name].file, tmp_path)
        assert left["MatMulIntegerToFloat"] + left["QLinearMatMul"] + left["QGemm"] == products, name
        assert left["QLinearConv"] == made[name].layers["Conv"], name
    assert kinds(made["fused"].file)["MultiHeadAttention"] == 4
    assert kinds(made["int8-dynamic"].file, tmp_path)["DynamicQuantizeMatMul"] == 16


def test_excluded_blocks_hold_none(made, tmp_path):
    source = made["source"]
    assert list(source.blocks) == ["patch_embed", "block 1", "block 2", "block 3", "block 4", "pyramid", "head"]
    proto, layers, left = source.build("int8", ["block 2", "head"])
    assert layers == {"MatMul": 12}
    assert left["in excluded blocks"] == 4 + made["int8"].layers["Conv"]
    g = Graph(proto)
    inside = {name for block in ("block 2", "head") for name in source.blocks[block]}
    for node in g.graph.node:
        if node.name in inside:
            assert not any(g.maker[x].op_type == "DequantizeLinear" for x in node.input if x in g.maker)
    result = quantize(
        made["fp32"], tmp_path / "x.onnx", precision="int8", calibration=".", exclude=["block2", "Head"], source=source
    )
    assert result.excluded == ["block 2", "head"]
    assert proto_metadata(load_proto(result.file))["precision"]["excluded"] == ["block 2", "head"]
    with pytest.raises(ConfigError, match=r"no block 'block 9'.*\n.*pyramid"):
        quantize(made["fp32"], tmp_path / "x.onnx", precision="int8", calibration=".", exclude=["block 9"])
    with pytest.raises(ConfigError, match="every block is excluded"):
        quantize(made["fp32"], tmp_path / "y.onnx", precision="int8-dynamic", exclude=list(source.blocks))


def test_blocks_are_the_same_before_and_after_fusing(made):
    plain = blocks_of(made["source"].original)
    fused = blocks_of(apply_variants(made["source"].original, ["attention"]))
    assert list(plain) == list(fused)
    assert all(len(fused[name]) < len(plain[name]) for name in plain if name.startswith("block"))
    nodes = [name for block in plain.values() for name in block]
    assert len(nodes) == len(set(nodes))


def test_ranges_and_files_of_the_same_seed_are_the_same(made, photos, tmp_path):
    again = quantize(made["fp32"], tmp_path / "again.onnx", precision="int8", calibration=photos, count=6)
    assert again.sha256 == made["int8"].sha256


# every precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-dynamic", "int8-weights"])
def test_metadata_are_carried_over(made, photos, precision):
    meta, before = (proto_metadata(load_proto(p)) for p in (made[precision].file, made["fp32"]))
    kept = ("part", "classes", "palette", "mean", "std", "resize", "cost", "checkpoint_sha256", "config_sha256")
    assert {key: meta[key] for key in kept} == {key: before[key] for key in kept}
    about = meta["precision"]
    assert (about["name"], about["parent_sha256"]) == (precision, sha256_file(made["fp32"]))
    assert meta["verified"] is True
    assert meta["parity"]["thresholds"]["cosine"] == PRECISIONS[precision].tolerance.cosine
    assert meta["parity"]["cosine"] >= PRECISIONS[precision].tolerance.cosine
    if precision == "int8":
        assert about["calibration"]["count"] == 6
        assert len(about["calibration"]["files"]) == 6
    else:
        assert about["calibration"] is None
    assert json.loads(made[precision].to_json())["kind"] == "tinymim.export"
    assert precision in made[precision].to_markdown()


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-dynamic", "int8-weights", "fused"])
def test_parts_can_still_be_cut(made, precision):
    proto = load_proto(made[precision].file)
    parts = {part: about["tensors"] for part, about in proto_metadata(proto)["cost"]["parts"].items()}
    pieces = cut(Path(made[precision].file).read_bytes(), parts)
    assert list(pieces) == list(parts)
    whole = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 255, (1, 3, 64, 96)).astype(np.uint8)
    known = {"image": image if precision == "fused" else (image / 64 - 2).astype(np.float32)}
    wanted = whole.run(None, known)[0]
    for piece in pieces.values():
        session = ort.InferenceSession(piece.model(known), providers=["CPUExecutionProvider"])
        known |= dict(
            zip(piece.outputs, session.run(piece.outputs, {name: known[name] for name in piece.inputs}), strict=True)
        )
    np.testing.assert_allclose(known["logits"], wanted, atol=0.05 * np.abs(wanted).max())


def test_fp16_is_half_with_float_ends(made):
    proto = load_proto(made["fp16"].file)
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)] == [TensorProto.FLOAT] * 2
    kept = [t.name for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert not kept
    assert kinds(made["fp16"].file)["Cast"] == kinds(made["fp32"])["Cast"] + 2
    assert 0.5 < made["fp16"].mib / made["fp16"].parent_mib < 0.65


def test_fp16_clips_what_is_too_large_and_keeps_epsilons():
    constants = {"w": np.float32([1e6, -1e6, 1e-9, 0]), "scales": np.float32([1, 1, 2, 1])}
    nodes = [
        helper.make_node("Add", ["image", "w"], ["a"]),
        helper.make_node("Resize", ["a", "", "scales"], ["y"], mode="nearest"),
        helper.make_node("Mul", ["y", "scales"], ["z"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, None, None]) for n in ("image", "z")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert to_half(proto) == 2
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    np.testing.assert_array_equal(stored["w"], np.float16([65504, -65504, 2.0**-24, 0]))
    assert stored["scales"].dtype == np.float32, "Resize wants its scales in float32"
    assert stored["scales_half"].dtype == np.float16
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": np.zeros((1, 1, 2, 4), np.float32)})
    assert (result.dtype, result.shape) == (np.float32, (1, 1, 4, 4))


def test_weights_alone_are_folded_back_and_small(made, tmp_path):
    assert made["int8-weights"].mib < 0.5 * made["int8-weights"].parent_mib
    left = kinds(made["int8-weights"].file, tmp_path)
    assert not {"DequantizeLinear", "MatMulNBits", "MatMulIntegerToFloat"} & set(left), "float arithmetic"


def test_free_sizes_and_masks(exported, photos, tmp_path):
    result = quantize(
        exported.mask.onnx, tmp_path / "m.onnx", precision="int8-dynamic", photos=photos, graph=["attention"]
    )
    assert [row.name for row in result.parity.rows[:2]] == ["mask", "logits"]
    for size in ((64, 96), (57, 83)):
        session = ort.InferenceSession(result.file, providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": np.zeros((1, 3, *size), np.float32)})[0].shape == (1, *size)


def test_backbone_features(exported, photos, tmp_path):
    result = quantize(
        exported.features.onnx, tmp_path / "f.onnx", precision="int8", calibration=photos, count=6, exclude=["block 1"]
    )
    assert result.layers == {"MatMul": 4 + 1}  # a block, and the wide last layer
    assert result.parity.rows[0].cosine > 0.99


def test_pixels_variant_takes_pixels(made, photos):
    mask = Predictor(made["fused"].file)
    plain = Predictor(made["fp32"])
    from PIL import Image

    photo = Image.open(photos / "0.png").convert("RGB")
    assert mask.engine.dtype == np.uint8
    assert (mask.mask(photo) == plain.mask(photo)).mean() > 0.8


def linear_proto(bias=True):
    """A foreign file: flatten, Gemm with a transposed weight, no metadata, nodes without names."""
    weight = np.random.default_rng(0).standard_normal((8, 3 * 16 * 16)).astype(np.float32)
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.arange(8, dtype=np.float32), "b")]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"] if bias else ["flat", "w"], ["features"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 8]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_foreign_file_goes_as_far_as_it_says(tmp_path, photos, bias):
    save_proto(linear_proto(bias), tmp_path / "foreign.onnx")
    result = quantize(tmp_path / "foreign.onnx", tmp_path / "out.onnx", precision="int8-dynamic")
    assert result.layers == {"MatMul": 1}
    assert not result.verified
    assert any("is not verified" in note for note in result.notes)
    with pytest.raises(ConfigError, match="how photos are normalised"):
        quantize(tmp_path / "foreign.onnx", tmp_path / "o.onnx", precision="int8", calibration=photos, count=6)


# honesty ----------------------------------------------------------------------------------------------------------


def test_a_file_that_disagrees_is_not_written(made, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(PRECISIONS["int8-dynamic"], "tolerance", Tolerance(1.1, 0))
    with pytest.raises(CheckFailed, match=r"tolerance of int8-dynamic: cosine 1\.1"):
        quantize(made["fp32"], tmp_path / "x.onnx", precision="int8-dynamic", photos=photos)
    assert list(tmp_path.iterdir()) == []


def test_verify_again(made, photos, tmp_path):
    path = tmp_path / "int8.onnx"
    shutil.copy(made["int8"].file, path)
    before = path.read_bytes()
    assert verify_file(path, made["fp32"], photos=photos).passed
    assert path.read_bytes() == before
    proto = load_proto(path)
    tensor = next(t for t in proto.graph.initializer if t.data_type == TensorProto.INT8)
    levels = numpy_helper.to_array(tensor).copy()
    levels.reshape(-1)[0] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(levels, tensor.name))
    save_proto(proto, path)
    with pytest.raises(CheckFailed, match="changed after"):
        verify_file(path, made["fp32"], photos=photos)
    assert proto_metadata(load_proto(path))["verified"] is False
    other = load_proto(made["fp32"])
    write_metadata(other, {"classes": ["other"]})
    save_proto(other, tmp_path / "other.onnx")
    with pytest.raises(CheckFailed, match="was not made from"):
        verify_file(made["int8"].file, tmp_path / "other.onnx")
    with pytest.raises(ConfigError, match="does not say what it was made from"):
        verify_file(tmp_path / "other.onnx", made["fp32"])


def test_a_file_changed_after_its_verification_does_not_pass_it_on(made, tmp_path):
    proto = load_proto(made["fp32"])
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    save_proto(proto, tmp_path / "changed.onnx")
    result = quantize(tmp_path / "changed.onnx", tmp_path / "x.onnx", precision="int8-weights")
    assert proto_metadata(proto)["verified"]
    assert not result.verified
    assert any("changed since" in note for note in result.notes)


def test_other_precisions_are_not_verified_against_the_checkpoint(made, files):
    before = sha256_file(made["int8"].file)
    with pytest.raises(ConfigError, match="not the plain FP32 file"):
        verify(made["int8"].file, files.segmentor)
    assert sha256_file(made["int8"].file) == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(precision="bf16"), ConfigError, "tinymim bench FILE.onnx --runtime openvino --precision bf16"),
        (dict(precision="int4"), ConfigError, "known: fp32, fp16"),
        (dict(precision="int8"), ConfigError, "--calibration FOLDER"),
        (dict(precision="fp16", calibration="x"), ConfigError, "does nothing for fp16"),
        (dict(precision="int8", calibration="nowhere"), DataError, "no folder"),
        (dict(precision="int8", calibration="nowhere", method="guess"), ConfigError, "method 'guess'"),
        (dict(precision="fp16", exclude=["head"]), ConfigError, "block by block"),
        (dict(precision="fp32", graph=["magic"]), ConfigError, "unknown"),
    ],
)
def test_options_that_do_not_fit(made, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        quantize(made["fp32"], tmp_path / "x.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_only_fp32_files_are_quantised_and_never_over_themselves(made, tmp_path):
    with pytest.raises(ConfigError, match="is int8 already"):
        quantize(made["int8"].file, tmp_path / "x.onnx", precision="fp16")
    with pytest.raises(ConfigError, match="cannot write"):
        quantize(made["fp32"], made["fp32"], precision="fp16")


@pytest.mark.parametrize("opset", [12, 21])
def test_opset_guard(made, photos, tmp_path, opset):
    proto = load_proto(made["fp32"])
    proto.opset_import[0].version = opset
    save_proto(proto, tmp_path / "opset.onnx")
    with pytest.raises(ConfigError, match=f"from 13 to 20; this file has {opset}"):
        quantize(tmp_path / "opset.onnx", tmp_path / "x.onnx", precision="int8", calibration=photos, count=6)


def test_damaged_file(made, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(Path(made["fp32"]).read_bytes()[:5000])
    with pytest.raises(DataError):
        quantize(tmp_path / "cut.onnx", tmp_path / "x.onnx", precision="fp16")
