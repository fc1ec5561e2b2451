"""Export: names, axes, metadata, any size, parity that catches a changed weight, pooling, folding, bad input."""

import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from tests.export.conftest import CLASSES, write_segmentor
from tinymim.errors import CheckFailed, CheckpointError, ConfigError, DataError, TinyMIMError
from tinymim.files import sha256_file
from tinymim.models import model_from_checkpoint, save_student
from tinymim_export import export, main, verify
from tinymim_export.graph.parity import compare, other_sizes
from tinymim_export.graph.torch_model import load_torch_model
from tinymim_export.graph.trace import trace
from tinymim_export.graph.wrappers import MatmulAvgPool2d
from tinymim_export.runtime.metadata import load_proto, proto_metadata, save_proto


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def axes(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), bins=st.sampled_from([1, 2, 3, 6, (2, 5), (None, 3)]))
def test_pooling_by_matrix_products_is_torchs_adaptive_pooling(height, width, bins):
    x = torch.randn(2, 3, height, width)
    wanted = torch.nn.functional.adaptive_avg_pool2d(x, bins)
    torch.testing.assert_close(MatmulAvgPool2d(bins)(x), wanted, atol=2e-6, rtol=1e-5)


def test_segmentor_fixed(files, exported):
    proto = load_proto(exported.fixed.onnx)
    assert [(v.name, axes(v)) for v in proto.graph.input] == [("image", ["batch", 3, 64, 96])]
    assert [(v.name, axes(v)) for v in proto.graph.output] == [("logits", ["batch", 7, 64, 96])]
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    onnx.checker.check_model(proto, full_check=True)
    with pytest.raises(Exception, match="invalid dimensions"):
        session(exported.fixed.onnx).run(None, {"image": np.zeros((1, 3, 64, 64), np.float32)})
    assert {row.shape[0] for row in exported.fixed.parity.rows if row.source == "random"} == {1, 3}
    refused, control = (
        next(row for row in exported.fixed.parity.rows if word in row.source) for word in ("refused", "mirrored")
    )
    assert refused.passed
    assert "Got: 80 Expected: 64" in refused.remark
    assert "refused, as it must be" in control.remark
    assert 1e-3 < float(control.remark.split()[2].rstrip(":")) < 3  # the measured difference


def test_metadata(files, exported):
    meta = proto_metadata(load_proto(exported.fixed.onnx))
    assert meta["part"] == "segmentor"
    assert meta["classes"] == CLASSES
    assert meta["palette"][3] == [3, 2, 3]
    assert (meta["mean"], meta["std"]) == ([120.0, 110.0, 100.0], [60.0, 58.0, 57.0])
    assert (meta["channel_order"], meta["stride"], meta["verified"]) == ("RGB", 16, True)
    assert meta["resize"] == {
        "scale": [2048, 512],
        "keep_ratio": True,
        "interpolation": "bilinear",
        "mode": "slide",
        "crop": [64, 96],
        "slide_stride": [42, 64],
        "align_corners": False,
        "threshold": None,
    }
    assert meta["checkpoint_sha256"] == sha256_file(files.segmentor)
    assert re.fullmatch("[0-9a-f]{64}", meta["config_sha256"])
    assert meta["versions"]["torch"]
    assert meta["parity"]["relative_error"] < 1e-4
    parts = meta["cost"]["parts"]
    assert list(parts) == ["backbone", "pyramid", "head", "upsampling"]
    model = load_torch_model(files.segmentor).model
    assert parts["head"]["params"] == sum(p.numel() for p in model.decode_head.parameters())
    assert parts["backbone"]["params"] + parts["pyramid"]["params"] == sum(
        p.numel() for p in model.backbone.parameters()
    )
    # by hand: patches, 4 blocks of 12 D^2 a token and 2 T^2 D for attention
    D, N = 24, 4 * 6
    T = N + 1
    assert parts["backbone"]["macs"] == 768 * D * N + 4 * (12 * D * D * T + 2 * T * T * D)
    assert parts["upsampling"]["macs"] == 4 * 7 * 64 * 96


def test_no_paths_inside(exported):
    for made in vars(exported).values():
        content = Path(made.onnx).read_bytes()
        for text in (b"/work", b"/tmp", b"site-packages", b"stack_trace", b"/home"):
            assert text not in content, text


@pytest.mark.parametrize("size", [(64, 96), (48, 80), (57, 83), (16, 16), (5, 200)])
def test_dynamic_mask_is_the_models_own_at_any_size(files, exported, size):
    """Against MMSegmentation's own inference, not against the wrapper."""
    from tinymim.seg import load_segmentor

    model, _ = load_segmentor(files.segmentor)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        about = dict(img_shape=size, pad_shape=size, ori_shape=size)
        wanted = model.whole_inference(images, [about] * 2).argmax(1)
    (mask,) = session(exported.mask.onnx).run(None, {"image": images.numpy()})
    assert mask.dtype == np.uint8
    assert mask.shape == (2, *size)
    assert (mask == wanted.numpy()).mean() > 0.999
    assert len(np.unique(mask)) > 1 or size == (16, 16)


def test_dynamic_axes_and_boundaries(exported):
    proto = load_proto(exported.mask.onnx)
    assert axes(proto.graph.input[0]) == ["batch", 3, "height", "width"]
    assert axes(proto.graph.output[0]) == ["batch", "height", "width"]
    named = {value.name for value in proto.graph.value_info}
    assert {"tap0", "tap3", "level0", "level3", "scores", "logits"} <= named
    sizes = {row.shape[2:] for row in exported.mask.parity.rows if row.source == "random"}
    assert len(sizes) == 3
    assert (64, 96) in sizes
    assert any(h % 16 and w % 16 for h, w in sizes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1024), st.integers(1, 1024))
def test_other_sizes_differ_and_are_ragged(height, width):
    traced, oblong, ragged = other_sizes((height, width), 16)
    assert oblong[0] != oblong[1]
    assert oblong != traced
    assert ragged[0] % 16
    assert ragged[1] % 16


def test_features_are_the_final_norms_patch_tokens(files, exported):
    vit, _ = model_from_checkpoint(files.star)
    images = torch.randn(2, 3, 70, 33)
    with torch.no_grad():
        tokens = vit(images)[:, 2:]
    (features,) = session(exported.features.onnx).run(["features"], {"image": images.numpy()})
    assert features.shape == (2, 40, 5, 3)
    np.testing.assert_allclose(features, tokens.transpose(1, 2).unflatten(2, (5, 3)).numpy(), atol=2e-5)


def test_backbone_with_a_config_gives_levels(files, tmp_path):
    made = export(files.segmentor, tmp_path / "levels.onnx", part="backbone", size=(40, 64))
    outputs = {value.name: axes(value) for value in load_proto(made.onnx).graph.output}
    assert outputs == {
        "level0": ["batch", 24, 10, 16],
        "level1": ["batch", 24, 5, 8],
        "level2": ["batch", 24, 3, 4],
        "level3": ["batch", 24, 2, 2],
    }


def test_student_in_a_config_says_its_pyramid_is_untrained(files, tmp_path):
    made = export(files.student, tmp_path / "levels.onnx", config=files.config, part="backbone")
    assert "untrained" in made.notes[0]
    meta = proto_metadata(load_proto(made.onnx))
    assert meta["config_sha256"] == sha256_file(files.config)
    assert verify(made.onnx, files.student, files.config).passed  # the same start values again


def float_weights(proto):
    return [
        i
        for i, tensor in enumerate(proto.graph.initializer)
        if tensor.data_type == onnx.TensorProto.FLOAT and numpy_helper.to_array(tensor).size > 16
    ]


@pytest.mark.parametrize("kind", ["fixed", "mask", "features"])
def test_one_changed_weight_is_seen(files, exported, kind):
    """By the outputs alone: the hash over the graph, which would see it anyway, is not asked."""
    made = getattr(exported, kind)
    checkpoint = files.star if kind == "features" else files.segmentor
    loaded = load_torch_model(checkpoint, part=made.part)
    proto = load_proto(made.onnx)
    assert compare(proto, loaded, file="x").passed
    draw = np.random.default_rng(0)
    for index in draw.choice(float_weights(proto), 6, replace=False):
        tensor = proto.graph.initializer[index]
        before = tensor.SerializeToString()
        array = numpy_helper.to_array(tensor).copy()
        at = int(draw.integers(array.size))
        array.reshape(-1)[at] += array.std() + 0.1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        assert not compare(proto, loaded, file="x").passed, (tensor.name, at)
        tensor.ParseFromString(before)


def test_verify_takes_the_mark_from_a_changed_file(files, exported, tmp_path):
    path = tmp_path / "changed.onnx"
    shutil.copy(exported.fixed.onnx, path)
    untouched = path.read_bytes()
    assert verify(path, files.segmentor).passed
    assert path.read_bytes() == untouched
    proto = load_proto(path)
    tensor = proto.graph.initializer[float_weights(proto)[0]]
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] += 1e-6  # too little for the outputs to tell; the hash does
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    save_proto(proto, path)
    with pytest.raises(CheckFailed, match="changed after it was verified"):
        verify(path, files.segmentor)
    assert proto_metadata(load_proto(path))["verified"] is False


class RoundedPool(torch.nn.Module):
    """How mmdeploy exports adaptive pooling: kernel = stride = floor(in / out)."""

    def __init__(self, bins):
        super().__init__()
        self.bins = bins

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, [max(side // self.bins, 1) for side in x.shape[-2:]])


def test_verify_against_another_checkpoint_fails_and_the_right_one_restores_the_mark(files, exported, tmp_path):
    path = shutil.copy(exported.features.onnx, tmp_path / "features.onnx")
    vit, _ = model_from_checkpoint(files.star)
    vit.cls_token.data[0, 0, 0] += 1  # one number (a shift of all would vanish in the LayerNorms)
    save_student(vit, tmp_path / "other.pth")
    with pytest.raises(CheckFailed, match="does not give"):
        verify(path, tmp_path / "other.pth")
    assert proto_metadata(load_proto(path))["verified"] is False
    assert verify(path, files.star).passed
    assert proto_metadata(load_proto(path))["verified"] is True


def test_full_disk_leaves_the_old_file(exported, tmp_path):
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    proto = load_proto(exported.fixed.onnx)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(TinyMIMError, match="cannot write"):
            save_proto(proto, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["old.onnx"]
    assert path.read_bytes() == b"old"


def test_failed_verification_leaves_no_file(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tinymim_export.graph.wrappers.MatmulAvgPool2d", RoundedPool)
    code = main(["--onnx", str(tmp_path / "wrong.onnx"), "--checkpoint", str(files.segmentor), "--size", "160", "224"])
    assert code == 1
    assert list(tmp_path.iterdir()) == []
    assert "does not give what PyTorch gives" in capsys.readouterr().err


def test_relative_bias_stays_a_table(files):
    """Every runtime makes (heads, tokens, tokens) constants of it when it loads: in the file they double its size."""
    proto = trace(load_torch_model(files.star), (256, 256)).proto
    large = [t for t in proto.graph.initializer if list(t.dims)[-2:] == [258, 258]]
    assert len(large) <= 1  # at most the one index all blocks share
    assert all(t.data_type == onnx.TensorProto.INT64 for t in large)


def test_photos_are_compared_too(files, exported, tmp_path):
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    loaded = load_torch_model(files.segmentor)
    rows = compare(load_proto(exported.fixed.onnx), loaded, file="x", photos=tmp_path).rows
    assert [row.shape for row in rows if row.source == "photos"] == [(2, 3, 64, 96)]
    assert all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(checkpoint="missing.pth"), CheckpointError, "does not exist"),
        (dict(size=(64, 64), dynamic=True), ConfigError, "exclude"),
        (dict(size=(0, 64)), ConfigError, "not possible"),
        (dict(part="segmentor"), CheckpointError, "--part backbone"),
        (dict(output="mask"), ConfigError, "a backbone cannot output a mask"),
        (dict(config="nowhere.py"), ConfigError, "neither a file nor"),
        (dict(photos="nowhere"), DataError, "no folder"),
        (dict(part="head"), ConfigError, "unknown"),
    ],
)
def test_bad_options(files, tmp_path, options, error, words):
    arguments = dict(checkpoint=files.student, onnx=tmp_path / "out.onnx") | options
    with pytest.raises(error, match=words):
        export(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_no_segmentor_says_what_it_is(files, tmp_path, capsys):
    code = main(["--onnx", str(tmp_path / "x.onnx"), "--checkpoint", str(files.student), "--part", "segmentor"])
    assert code == 2
    assert "width 24, 4 blocks" in capsys.readouterr().err


def test_mask_of_too_many_classes(tmp_path):
    path = write_segmentor(tmp_path / "many.pth", num_classes=257)
    with pytest.raises(ConfigError, match="257 classes"):
        export(path, tmp_path / "x.onnx", output="mask")


def test_damaged_files(files, exported, tmp_path):
    whole = Path(exported.fixed.onnx).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "cut.pth").write_bytes(files.student.read_bytes()[:2000])
    for name in ("cut.onnx", "text.onnx", "none.onnx"):
        with pytest.raises(DataError):
            verify(tmp_path / name, files.segmentor)
    with pytest.raises(CheckpointError):
        export(tmp_path / "cut.pth", tmp_path / "x.onnx")


def test_command_verifies_writes_and_names_the_next(files, exported, tmp_path, capsys):
    result = tmp_path / "result.json"
    code = main(["--verify-only", exported.fixed.onnx, "--checkpoint", str(files.segmentor), "--json", str(result)])
    out = capsys.readouterr().out
    assert code == 0
    assert "-[ok] logits 3x3x64x96 random" in out
    assert "next: tinymim bench" in out
    assert json.loads(result.read_text())["passed"] is True
    assert "| ok | logits |" in exported.fixed.to_markdown()
