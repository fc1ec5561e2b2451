"""SmoothQuant and wide INT8: exact in float, better with outliers, refused where they do not fit."""

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest

from tests.export.photographs import write_photos
from tests.export.tiny import write_segmentor
from tinymim.errors import ConfigError
from tinymim_export.precision.calibrate import measure
from tinymim_export.precision.int8_smooth import smooth
from tinymim_export.precision.onnx_graph import Graph
from tinymim_export.precision.qdq import prepare
from tinymim_export.precision.quantize import FloatFile, quantize
from tinymim_export.runtime.metadata import load_proto, proto_metadata, save_proto


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture(scope="module")
def outliers(exported, tmp_path_factory):
    """The tiny segmentor with a channel of every first normalisation 60 times larger and its weights 60 times smaller:
    the same function, as a trained ViT's outlier channels are."""
    proto = load_proto(exported.fixed.onnx)
    g = prepare(proto)
    for node in [node for node in g.graph.node if node.op_type == "LayerNormalization"]:
        users = g.users[node.output[0]]
        if any(user.op_type != "MatMul" for user in users):
            continue
        factor = np.ones(g.constant(node.input[1]).shape, np.float32)
        factor[3] = 60
        for at in (1, 2):
            node.input[at] = g.add_constant(f"{node.output[0]}_{at}", g.constant(node.input[at]) * factor)
        for user in users:
            user.input[1] = g.add_constant(f"{user.name}_w", g.constant(user.input[1]) / factor[:, None])
    path = tmp_path_factory.mktemp("outliers") / "fp32.onnx"
    save_proto(proto, path)
    return path


def run(proto, image):
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"image": image}
    )


def test_smoothing_alone_changes_nothing_in_float_and_evens_out_the_channels(outliers):
    proto, image = load_proto(outliers), np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)
    wanted, g = run(proto, image)[0], prepare(proto)
    norms = [node.output[0] for node in g.graph.node if node.op_type == "LayerNormalization"]
    found = measure(proto, norms, iter([image]), 1, quiet=True)
    before = Counter(node.op_type for node in proto.graph.node)
    ranges = smooth(g, {name: found[name].channels for name in norms})
    assert len(ranges) == 8, "both of every block"
    assert Counter(node.op_type for node in proto.graph.node) == before, "no node is added"
    np.testing.assert_allclose(run(proto, image)[0], wanted, atol=2e-5 * np.abs(wanted).max())
    again = measure(proto, list(ranges), iter([image]), 1, quiet=True)
    for name, (low, high) in ranges.items():
        np.testing.assert_allclose([again[name].low, again[name].high], [low, high], rtol=1e-4)
        assert high - low < 0.5 * (found[name].high - found[name].low)


def test_smoothing_helps_where_channels_stick_out(outliers, photos, tmp_path):
    source = FloatFile(outliers)
    source.verified = True
    errors = {}
    for precision in ("int8", "int8-smooth"):
        made = quantize(
            outliers, tmp_path / f"{precision}.onnx", precision=precision, calibration=photos, count=6, source=source
        )
        assert proto_metadata(load_proto(made.file))["precision"]["name"] == precision
        assert made.layers["MatMul"] == 16
        errors[precision] = 1 - made.parity.rows[0].cosine
    assert errors["int8-smooth"] < 0.7 * errors["int8"]


def test_no_normalisation_no_smoothing(photos, tmp_path):
    file = write_segmentor(tmp_path / "fp32.onnx")
    with pytest.raises(ConfigError, match="does not fit"):
        quantize(file, tmp_path / "out.onnx", precision="int8-smooth", calibration=photos, count=4)
    assert not (tmp_path / "out.onnx").exists()


def test_wide_int8_reaches_both_products_of_attention(exported, photos, tmp_path):
    made = quantize(exported.fixed.onnx, tmp_path / "wide.onnx", precision="int8-wide", calibration=photos, count=6)
    plain = quantize(exported.fixed.onnx, tmp_path / "int8.onnx", precision="int8", calibration=photos, count=6)
    assert made.layers["MatMul"] == plain.layers["MatMul"] + 8, "two products in each of four blocks"
    assert "products of activations (attention)" in plain.left
    assert "products of activations (attention)" not in made.left
    g = Graph(load_proto(made.file))
    for softmax in [node for node in g.graph.node if node.op_type == "Softmax"]:
        scores = g.maker[softmax.input[0]]
        q, k = (g.maker[name] for name in scores.input)
        (shares,) = g.users[softmax.output[0]]
        assert [q.op_type, k.op_type, shares.op_type] == ["DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]
        assert g.constant(q.input[2]) == g.constant(k.input[2]) == 0
        assert g.constant(q.input[2]).dtype == np.int8, "signed: OpenVINO's kernel takes no zero points"
        assert g.constant(shares.input[2]).dtype == np.uint8


def test_wide_int8_leaves_attention_of_excluded_blocks_in_float(exported, photos, tmp_path):
    source = FloatFile(exported.fixed.onnx)
    source.calibrate(photos, 6, 0)
    made, _, left = source.build("int8-wide", ["block 1"])
    assert left["in excluded blocks"] == 6, "four layers and two products"
    g = Graph(made)
    first = next(node for node in g.graph.node if node.op_type == "Softmax")
    assert g.users[first.output[0]][0].op_type == "MatMul"
