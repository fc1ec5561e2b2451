"""Graph variants: the same values in fewer nodes, at every size; and honest refusals where a variant does not fit."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.errors import ConfigError
from tinymim_export import export
from tinymim_export.precision.variants import VARIANTS, apply_variants
from tinymim_export.runtime.metadata import load_proto, proto_metadata


def run(proto, images):
    """First output on the CPU."""
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[0]


def kinds(proto):
    return [node.op_type for node in proto.graph.node]


def close(a, b):
    return np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.fixture(scope="module")
def protos(exported):
    """The exported files as ModelProto."""
    return {name: load_proto(made.onnx) for name, made in vars(exported).items()}


@pytest.fixture(scope="module")
def star(files):
    """Relative-position bias, fixed size: the bias is a constant."""
    made = export(files.star, files.folder / "star_fixed.onnx", part="backbone", size=(48, 64))
    return load_proto(made.onnx)


def test_attention_becomes_one_node_a_block(protos):
    fused = apply_variants(protos["fixed"], ["attention"])
    assert kinds(fused).count("MultiHeadAttention") == 4
    assert "Softmax" not in kinds(fused)
    assert len(fused.graph.node) < 0.75 * len(protos["fixed"].graph.node)
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 64, 96)).astype(np.float32)
        assert close(run(fused, images), run(protos["fixed"], images))
    assert proto_metadata(fused)["graph"] == ["attention"]
    assert "graph" not in proto_metadata(protos["fixed"]), "the input must not be touched"


@pytest.mark.slow
def test_attention_with_relative_bias_fixed_and_free_sizes(protos, star):
    fused = apply_variants(star, ["attention"])
    assert kinds(fused).count("MultiHeadAttention") == 2
    images = np.random.default_rng(0).standard_normal((2, 3, 48, 64)).astype(np.float32)
    assert close(run(fused, images), run(star, images))
    dynamic = apply_variants(protos["features"], ["attention"])
    assert kinds(dynamic).count("MultiHeadAttention") == 2
    for height, width in ((48, 48), (64, 40), (33, 50)):
        images = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)
        assert close(run(dynamic, images), run(protos["features"], images))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(height=st.integers(20, 100), width=st.integers(20, 100), batch=st.integers(1, 2))
def test_attention_in_a_dynamic_mask_file_at_any_size(protos, height, width, batch):
    images = np.random.default_rng(height).standard_normal((batch, 3, height, width)).astype(np.float32)
    fused = apply_variants(protos["mask"], ["attention"])
    assert (run(fused, images) == run(protos["mask"], images)).mean() >= 0.999


@pytest.mark.parametrize("name", ["fixed", "mask"])
def test_pixels_in_gives_the_same(protos, name):
    proto = protos[name]
    meta = proto_metadata(proto)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), np.uint8)
    mean, std = (np.float32(meta[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    want = run(proto, (pixels - mean) / std)
    made = apply_variants(proto, ["pixels"])
    assert made.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert proto_metadata(made)["input"] == {"range": "pixels"}
    got = run(made, pixels)
    assert (got == want).mean() >= 0.999 if name == "mask" else close(got, want)
    # a fixed multiple of the patch is never padded: folded; free sizes are padded after normalisation: not folded
    assert ("normalised" in {n for node in made.graph.node for n in node.output}) is (name == "mask")


def test_pixels_at_a_size_that_is_padded(protos):
    proto = protos["mask"]
    meta = proto_metadata(proto)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 41, 70), np.uint8)
    mean, std = (np.float32(meta[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    made = apply_variants(proto, ["pixels"])
    assert (run(made, pixels) == run(proto, (pixels - mean) / std)).mean() >= 0.999


def test_early_argmax_is_a_nearest_mask_of_the_small_decision(protos):
    proto = protos["mask"]
    made = apply_variants(proto, ["early-argmax"])
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    got = run(made, images)
    assert got.dtype == np.uint8
    assert got.shape == (2, 64, 96)
    shown = type(proto)()
    shown.CopyFrom(proto)
    shown.graph.output.insert(
        0, onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 7, "h", "w"])
    )
    small = run(shown, images).argmax(1).astype(np.uint8)
    assert (got == small.repeat(4, 1).repeat(4, 2)).all()
    assert 0.5 < (got == run(proto, images)).mean() <= 1
    odd = np.random.default_rng(0).standard_normal((1, 3, 50, 37)).astype(np.float32)
    assert run(made, odd).shape == (1, 50, 37)
    parts = proto_metadata(made)["cost"]["parts"]
    assert parts["upsampling"] == {"params": 0, "macs": 0, "tensors": ["mask"]}


def test_merged_convolutions_give_the_same_with_fewer_products(protos):
    made = apply_variants(protos["fixed"], ["merged"])
    before, after = kinds(protos["fixed"]), kinds(made)
    assert before.count("Conv") - after.count("Conv") == 2, "the lateral convolutions of the two enlarged levels"
    assert before.count("ConvTranspose") == after.count("ConvTranspose") == 3
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 96)).astype(np.float32)
    assert close(run(made, images), run(protos["fixed"], images))
    old, new = (proto_metadata(proto)["cost"] for proto in (protos["fixed"], made))
    tensors = {name for node in made.graph.node for name in node.output}
    assert set(new["parts"]["pyramid"]["tensors"]) - {"level2"} <= tensors, "what --split cuts at; level2 is tap2"
    assert sum(part["macs"] for part in new["parts"].values()) == new["macs"] < old["macs"]


def test_attention_takes_three_products_without_a_cut(protos):
    made = apply_variants(protos["fixed"], ["attention"])
    before, after = kinds(protos["fixed"]), kinds(made)
    assert "Split" not in after
    blocks = after.count("MultiHeadAttention")
    assert after.count("MatMul") == before.count("MatMul"), "three for one; attention's two are in the node"
    assert blocks == before.count("Softmax")


def test_all_together_and_no_variant_twice(protos):
    all_but_merged = [name for name in VARIANTS if name != "merged"]
    made = apply_variants(protos["mask"], all_but_merged)
    assert proto_metadata(made)["graph"] == all_but_merged
    again = apply_variants(made, ["attention", "pixels"])
    assert kinds(again) == kinds(made)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), np.uint8)
    assert run(made, pixels).shape == (2, 64, 96)


@pytest.mark.parametrize(("name", "variant"), [("fixed", "early-argmax"), ("features", "early-argmax")])
def test_a_variant_that_does_not_fit(protos, name, variant):
    with pytest.raises(ConfigError, match=f"'{variant}' does not fit"):
        apply_variants(protos[name], [variant])


def test_files_of_others():
    """A graph with a softmax but no attention, and without our metadata."""
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [node("Softmax", ["image"], ["out"])],
        "other",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    for variant in VARIANTS:
        with pytest.raises(ConfigError, match="does not fit"):
            apply_variants(proto, [variant])
    with pytest.raises(ConfigError, match="unknown"):
        apply_variants(proto, ["faster"])
