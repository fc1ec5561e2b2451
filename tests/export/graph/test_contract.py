"""The file's contract: what the model's test loader and preprocessor really do, repeated or refused; and tested."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tinymim.seg  # noqa: F401
from tests.export.foreign import plain_file
from tests.export.graph.test_foreign import FOUR, head
from tinymim.errors import CheckFailed, ConfigError
from tinymim_export import Predictor, export, verify
from tinymim_export.graph.contract import contract, fixed_input, prepared, test_rule, test_steps
from tinymim_export.graph.own_test import own_test
from tinymim_export.graph.torch_model import load_torch_model
from tinymim_export.runtime.metadata import load_proto, proto_metadata, write_metadata

from mmengine.config import Config  # isort: skip
from mmengine.registry import init_default_scope  # isort: skip
from mmseg.registry import MODELS  # isort: skip

test_rule.__test__ = test_steps.__test__ = False  # functions of ours, no tests
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
IMAGENET = dict(mean=MEAN, std=STD)
RGB = IMAGENET | dict(bgr_to_rgb=True)
LOAD, PACK = dict(type="LoadImageFromFile"), dict(type="PackSegInputs")
SMALL, STRETCH = dict(type="Resize", scale=(160, 120), keep_ratio=True), dict(type="Resize", scale=(96, 64))
NORMALISE = dict(type="Normalize", **IMAGENET)


def config(pre, *steps, loader="test_dataloader", test=None):
    """A small foreign segmentor that is tested by this preprocessor and these steps."""
    init_default_scope("mmseg")
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor") | pre,
        backbone=FOUR,
        decode_head=head("FCNHead", in_channels=16, in_index=1, channels=8, num_convs=1),
        test_cfg=test or dict(mode="whole"),
    )
    return Config({"model": model, loader: dict(dataset=dict(type="X", pipeline=[LOAD, *steps, PACK]))})


def read(cfg):
    return prepared(cfg, MODELS.build(cfg.model.data_preprocessor))


SAME = [  # preprocessor, steps -> mean, std (RGB, units of the pixels) and the order the network sees
    (RGB, [SMALL], MEAN, STD, "RGB"),
    (IMAGENET, [SMALL], MEAN[::-1], STD[::-1], "BGR"),
    (IMAGENET | dict(rgb_to_bgr=True), [SMALL], MEAN, STD, "RGB"),  # MMSegmentation reverses either way
    (dict(mean=MEAN[::-1], std=[1, 1, 1]), [], MEAN, [1, 1, 1], "BGR"),  # Caffe's
    (dict(bgr_to_rgb=True), [STRETCH], [0, 0, 0], [1, 1, 1], "RGB"),
    (dict(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=True), [], [0, 0, 0], [1, 1, 1], "RGB"),
    (dict(mean=[120, 110, 100], std=[1.5, 1.2, 0.9], bgr_to_rgb=True), [], [120, 110, 100], [1.5, 1.2, 0.9], "RGB"),
    (dict(mean=[127.5], std=[255]), [], [127.5] * 3, [255] * 3, "BGR"),
    ({}, [SMALL, NORMALISE], MEAN, STD, "RGB"),
    ({}, [SMALL, dict(NORMALISE, to_rgb=False)], MEAN[::-1], STD[::-1], "BGR"),
    (
        dict(mean=[0.1, 0.2, 0.3], std=[2, 2, 2], bgr_to_rgb=True),
        [dict(NORMALISE, to_rgb=False)],
        [109.2675, 127.704, 141.1935],
        [114.75, 114.24, 116.79],
        "RGB",
    ),
    (dict(type="mmengine.ImgDataPreprocessor", **RGB), [], MEAN, STD, "RGB"),
]


@pytest.mark.parametrize(("pre", "steps", "mean", "std", "order"), SAME)
def test_normalisation_in_its_own_units_and_order(pre, steps, mean, std, order):
    found = read(config(pre, *steps))
    told = contract(found, 16)
    assert (told["mean"], told["std"], told["channel_order"], found.order) == (mean, std, "RGB", order)


def test_the_preprocessor_is_repeated_number_by_number():
    """Any of them: the network's input is (pixels - mean) / std of the contract."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3)).astype(np.float32)[0]
    for pre, *_ in SAME:
        cfg = config(pre)
        told, found = contract(read(cfg), 16), read(cfg)
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if "mmengine" in pre.get("type", ""):
            continue  # takes lists in its own way
        seen = MODELS.build(cfg.model.data_preprocessor)(dict(inputs=[image.flip(0)], data_samples=None))["inputs"][0]
        ours = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
        ours = ours.transpose(2, 0, 1)[:: -1 if found.order == "BGR" else 1]
        np.testing.assert_allclose(ours, seen.numpy(), atol=1e-4)


MULTIPLE = dict(type="ResizeToMultiple", size_divisor=32)


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ([], {"scale": None}),
        ([dict(type="Resize", scale=512)], {"scale": [512, 512], "keep_ratio": False}),
        ([SMALL, MULTIPLE], {"scale": [160, 120], "keep_ratio": True, "multiple": [32, 32]}),
        ([MULTIPLE], {"scale": None, "multiple": [32, 32]}),
        ([dict(type="ResizeShortestEdge", scale=100, max_size=300)], {"scale": [300, 100], "keep_ratio": True}),
        ([NORMALISE, SMALL], {"float": True}),
        ([dict(type="mmseg.Resize", scale=(160, 120), keep_ratio=True)], {"scale": [160, 120]}),
        ([dict(type="LoadAnnotations"), dict(type="RandomFlip", prob=0.0)], {"scale": None}),
    ],
)
def test_sizes_that_are_repeated(steps, rule):
    found = read(config(RGB, *steps)).resize
    assert {name: found.get(name) for name in rule} == rule


REFUSED = [
    (dict(type="Resize", scale_factor=0.5), "Resize"),
    (dict(SMALL, interpolation="bicubic"), "bicubic"),
    (dict(SMALL, interpolation="nearest"), "nearest"),
    (dict(SMALL, backend="pillow"), "pillow"),
    (dict(type="Pad", size_divisor=32), "Pad"),
    (dict(type="CenterCrop", crop_size=64), "CenterCrop"),
    (dict(type="Rerange"), "Rerange"),
    (dict(type="CLAHE"), "CLAHE"),
    (dict(type="RGB2Gray"), "RGB2Gray"),
    (dict(type="AdjustGamma"), "AdjustGamma"),
    (dict(type="RandomFlip", prob=0.5), "RandomFlip"),
    (dict(type="PhotoMetricDistortion"), "PhotoMetricDistortion"),
    (dict(type="somewhere.MyOwn"), "MyOwn"),
    (dict(LOAD, color_type="grayscale"), "grayscale"),
    (dict(LOAD, color_type="unchanged"), "unchanged"),
    (dict(LOAD, imdecode_backend="tifffile"), "tifffile"),
]


@pytest.mark.parametrize(("step", "word"), REFUSED)
def test_steps_that_no_file_can_repeat_are_refused_by_name(step, word):
    with pytest.raises(ConfigError, match="cannot be put into a file") as caught:
        read(config(RGB, step))
    assert word in caught.value.what


def test_two_resizes_other_channels_and_other_preprocessors_are_refused():
    for pre, steps, word in (
        (RGB, [SMALL, STRETCH], "resized before"),
        (dict(mean=[1, 2, 3, 4], std=[1] * 4), [], "4 channels"),
        (dict(type="mmengine.ImgDataPreprocessor", pad_size_divisor=32, **RGB), [], "stretches"),
    ):
        with pytest.raises(ConfigError, match=word):
            read(config(pre, *steps))


def test_the_pipeline_is_the_loaders_not_a_variables():
    cfg = config(RGB, STRETCH)
    cfg.test_pipeline = [LOAD, SMALL]  # a name; nothing runs it
    cfg.val_dataloader = dict(dataset=dict(pipeline=[LOAD]))
    assert read(cfg).resize["scale"] == [96, 64]
    cfg.test_dataloader = None
    assert read(cfg).resize["scale"] is None
    cfg.val_dataloader = dict(dataset=dict(type="ConcatDataset", datasets=[dict(pipeline=[LOAD, STRETCH])]))
    assert read(cfg).resize["scale"] == [96, 64]
    cfg.val_dataloader = None
    assert read(cfg).resize["scale"] == [160, 120]
    cfg.test_pipeline = None
    assert "no test pipeline" in read(cfg).notes[0]


def test_the_size_every_photo_comes_to():
    box = {"scale": [160, 120], "keep_ratio": True}
    for rule, size in (
        ({"scale": None}, None),
        (box, None),
        ({"scale": [96, 64], "keep_ratio": False}, (64, 96)),
        ({"scale": [90, 60], "keep_ratio": False, "multiple": [32, 32]}, (64, 96)),
        ({"scale": [90, 60], "keep_ratio": False, "pad": {"size_divisor": 32}}, (64, 96)),
        (box | {"pad": {"size": [160, 160]}}, (160, 160)),
        (box | {"pad": {"size": [120, 160]}}, None),  # a portrait is higher
        (box | {"pad": {"size_divisor": 32}}, None),
    ):
        assert fixed_input(rule) == size


@pytest.fixture(scope="module")
def caffe(tmp_path_factory):
    """A model of BGR photos in Caffe's units, tested whole at sizes of their own, exported without options."""
    folder = tmp_path_factory.mktemp("caffe")
    cfg = config(dict(mean=MEAN[::-1], std=[57.0, 58.0, 59.0]), dict(LOAD, to_float32=True), SMALL, MULTIPLE)
    cfg.test_dataloader.dataset.pipeline.pop(0)
    cfg.crop_size = (64, 96)
    checkpoint, config_file = plain_file(cfg, folder / "iter_1.pth")
    return checkpoint, config_file, export(checkpoint, folder / "caffe.onnx", config=config_file)


def test_the_files_masks_are_the_models_own(caffe, tmp_path):
    """By MMSegmentation's code on photos the check did not see; and told in result, metadata and on the screen."""
    checkpoint, config_file, made = caffe
    loaded = load_torch_model(checkpoint, config=config_file)
    for size in ((90, 130), (130, 90), (60, 200)):
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
        row = own_test(loaded, load_proto(made.onnx), picture)
        assert row.passed
        assert row.pixels == size[0] * size[1]
        assert Predictor(made.onnx, threads=1).mask(picture).shape == size
    meta, told = proto_metadata(load_proto(made.onnx)), made.parity.test_step()
    assert told["equal"] >= 0.999 * told["pixels"] > 0
    assert meta["parity"]["test_step"] == told == json.loads(made.to_json())["parity"]["summary"]["test_step"]
    assert f"{told['equal']} of {told['pixels']} pixels" in made.to_markdown()
    assert made.dynamic  # photos of any size can be scored and predicted without a flag
    assert made.parity.test_step()["photo"] != list(made.size)


@pytest.mark.parametrize(
    ("wrong", "step"),
    [
        ({"std": [1.0, 1.0, 1.0]}, "normalisation differs"),
        ({"mean": [0.0, 0.0, 0.0]}, "normalisation differs"),
        ({"resize": {"scale": [120, 90], "keep_ratio": True, "mode": "whole"}}, "resizing or padding differs"),
        ({"resize": {"scale": [160, 120], "keep_ratio": True, "mode": "whole"}}, "resizing or padding differs"),
    ],
)
def test_a_wrong_contract_is_not_verified_and_the_step_is_named(caffe, wrong, step, tmp_path):
    checkpoint, config_file, made = caffe
    proto = load_proto(made.onnx)
    write_metadata(proto, wrong)
    row = own_test(load_torch_model(checkpoint, config=config_file), proto)
    assert not row.passed
    assert step in row.remark


def test_verify_takes_the_mark_from_a_file_with_another_contract(caffe, tmp_path):
    checkpoint, config_file, made = caffe
    path = shutil.copy(made.onnx, tmp_path / "changed.onnx")
    proto = load_proto(path)
    write_metadata(proto, {"mean": [1.0, 2.0, 3.0]})
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match="metadata"):
        verify(path, checkpoint, config_file)
    assert proto_metadata(load_proto(path))["verified"] is False


def test_a_model_whose_own_test_does_not_run_is_not_verified(caffe):
    checkpoint, config_file, made = caffe
    loaded = load_torch_model(checkpoint, config=config_file)
    loaded.model.data_preprocessor = MODELS.build(dict(type="mmengine.BaseDataPreprocessor"))  # makes no batch
    with pytest.raises(CheckFailed, match="own test_step fails"):
        own_test(loaded, load_proto(made.onnx))


KINDS = {
    "pad to a size": (RGB | dict(pad_val=7, test_cfg=dict(size=(160, 160))), [SMALL], None),
    "pad to a multiple": (RGB | dict(pad_val=-1, test_cfg=dict(size_divisor=32)), [SMALL], None),
    "windows": (RGB, [SMALL], dict(mode="slide", crop_size=(64, 96), stride=(42, 64))),
    "windows of photos as they are": (IMAGENET, [], dict(mode="slide", crop_size=(64, 96), stride=(42, 64))),
    "not normalised": ({}, [STRETCH], None),
    "normalised in the pipeline": ({}, [NORMALISE, SMALL], None),
    "shortest edge": (RGB, [dict(type="ResizeShortestEdge", scale=100, max_size=300)], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_every_kind(kind, output, tmp_path):
    pre, steps, test = KINDS[kind]
    cfg = config(pre, *steps, test=test)
    cfg.crop_size = (64, 96)
    checkpoint, config_file = plain_file(cfg, tmp_path / "iter_1.pth")
    made = export(checkpoint, tmp_path / "x.onnx", config=config_file, output=output)
    assert made.parity.test_step()["equal"] >= 0.999 * made.parity.test_step()["pixels"]
    picture = np.random.default_rng(1).integers(0, 256, (101, 133, 3), np.uint8)
    if output == "logits":
        assert Predictor(made.onnx).mask(picture).shape == (101, 133)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pad to a size", "not normalised"])
def test_a_size_that_no_photo_comes_to_is_said_and_tested_on_a_stretched_photo(kind, tmp_path):
    pre, steps, _ = KINDS[kind]
    checkpoint, config_file = plain_file(config(pre, *steps), tmp_path / "iter_1.pth")
    made = export(checkpoint, tmp_path / "x.onnx", config=config_file, size=(80, 112))
    assert made.parity.passed
    assert any("--resize-to-file" in note for note in made.notes)
    picture = np.random.default_rng(1).integers(0, 256, (101, 133, 3), np.uint8)
    assert Predictor(made.onnx, resize_to_file=True).mask(picture).shape == (101, 133)
