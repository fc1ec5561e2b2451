"""Any EncoderDecoder of MMSegmentation through the same door; heads that read less than the backbone gives."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

import tinymim.seg  # noqa: F401
from tests.export.conftest import CLASSES, CONFIG
from tests.export.foreign import SIZE, SMALL, plain_file, tiny
from tinymim.errors import CheckpointError, ConfigError
from tinymim.seg import load_segmentor
from tinymim_export import bench, export, verify
from tinymim_export.bench.graph_parts import cut
from tinymim_export.graph.cost import pieces
from tinymim_export.graph.torch_model import load_torch_model
from tinymim_export.runtime.metadata import load_proto, proto_metadata

from mmengine.config import Config  # isort: skip
from mmseg.registry import MODELS  # isort: skip

FOUR = dict(type="FourLevels")
LOSS = dict(type="CrossEntropyLoss")


def own_inference(checkpoint, config, images):
    """Logits by MMSegmentation's own code."""
    model, _ = load_segmentor(checkpoint, config)
    about = dict(img_shape=images.shape[-2:], pad_shape=images.shape[-2:], ori_shape=images.shape[-2:])
    with torch.no_grad():
        return model.whole_inference(images, [about] * len(images)).numpy()


def run(path, images):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": images.numpy()})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deeplabv3plus_r18_camvid", "segformer_b0_camvid", "pidnet_s_camvid"])
def test_a_plain_mmsegmentation_file_at_free_sizes(name, tmp_path):
    """From MMSegmentation's iter_N.pth and config; at sizes the verification did not try."""
    checkpoint, config = plain_file(tiny(name), tmp_path / "iter_4.pth")
    made = export(checkpoint, tmp_path / "any.onnx", config=config, size=None, dynamic=True)
    size = (72, 104) if name == "pidnet_s_camvid" else (71, 107)
    images = torch.randn(2, 3, *size)
    wanted = own_inference(checkpoint, config, images)
    np.testing.assert_allclose(run(made.onnx, images), wanted, atol=1e-4 * np.abs(wanted).max())
    meta = proto_metadata(load_proto(made.onnx))
    assert (meta["part"], meta["classes"], meta["verified"]) == ("segmentor", CLASSES, True)
    assert meta["mean"] == [123.675, 116.28, 103.53]
    assert list(meta["cost"]["parts"]) == ["backbone", "head", "upsampling"]
    assert verify(made.onnx, checkpoint, config).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_fixed_masks_and_their_parts(name, tmp_path):
    checkpoint, config = plain_file(tiny(name), tmp_path / "iter_4.pth")
    made = export(checkpoint, tmp_path / "mask.onnx", config=config, size=SIZE, output="mask")
    images = torch.randn(2, 3, *SIZE)
    assert (run(made.onnx, images) == own_inference(checkpoint, config, images).argmax(1)).mean() > 0.999
    (split,) = bench(made.onnx, split=True, runs=10, threads=1).splits
    assert [row.part for row in split.rows] == ["backbone", "head", "upsampling"]
    assert all(row.ms > 0 for row in split.rows)


@pytest.mark.slow
def test_what_training_alone_needs_is_not_counted(tmp_path):
    """PIDNet's p and d heads; a list of auxiliary heads."""
    cfg = tiny("pidnet_s_camvid")
    aux = dict(type="FCNHead", in_channels=32, channels=8, num_convs=1, num_classes=7, loss_decode=LOSS)
    cfg.model.auxiliary_head = [dict(aux, in_index=1), dict(aux, in_index=1)]
    cfg.model.data_preprocessor.pop("test_cfg")
    checkpoint, config = plain_file(cfg, tmp_path / "iter_1.pth")
    loaded = load_torch_model(checkpoint, config=config)
    assert loaded.multiple == 8
    assert loaded.contract["resize"]["pad"] == {"value": 0, "size_divisor": 8}  # photos of other sides are padded
    part, head = pieces(loaded, SIZE).parts["head"], loaded.model.decode_head
    assert part.params == sum(p.numel() for module in (head.i_head, head.conv_seg) for p in module.parameters())
    assert part.params < sum(p.numel() for p in head.parameters())
    with pytest.raises(ConfigError, match="multiples of 8") as caught:
        export(checkpoint, tmp_path / "x.onnx", config=config, size=(100, 60))
    assert caught.value.fix == "--size 96 64"
    assert not (tmp_path / "x.onnx").exists()


@MODELS.register_module(force=True)
class FourLevels(torch.nn.Module):
    """A backbone of four convolutions: 8, 16, 32, 64 channels at strides 4, 8, 16, 32."""

    def __init__(self, **options):
        super().__init__()
        sides = ((3, 8, 4), (8, 16, 2), (16, 32, 2), (32, 64, 2))
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, s, 1) for a, b, s in sides)

    def init_weights(self):
        pass

    def forward(self, x):
        levels = []
        for stage in self.stages:
            x = torch.relu(stage(x))
            levels.append(x)
        return tuple(levels)


@MODELS.register_module(force=True)
class OneSize(torch.nn.Module):
    """A backbone with positions for one size."""

    def __init__(self, **options):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 8, 16, 16)
        self.pos = torch.nn.Parameter(torch.randn(1, 8, 4, 6))

    def init_weights(self):
        pass

    def forward(self, x):
        return (self.patch(x) + self.pos,)


def own_config(**model):
    pre = dict(type="SegDataPreProcessor", mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, size=SIZE)
    return Config(dict(model=dict(type="EncoderDecoder", data_preprocessor=pre, test_cfg=dict(mode="whole"), **model)))


def head(kind, **options):
    return dict(type=kind, num_classes=7, loss_decode=LOSS, align_corners=False, norm_cfg=dict(type="BN"), **options)


@pytest.mark.slow
def test_a_backbone_of_one_size(tmp_path):
    cfg = own_config(backbone=dict(type="OneSize"), decode_head=head("FCNHead", in_channels=8, in_index=0, channels=8))
    checkpoint, config = plain_file(cfg, tmp_path / "iter_1.pth")
    assert load_torch_model(checkpoint, config=config).multiple is None
    for options in (dict(size=(96, 96)), dict(dynamic=True)):
        with pytest.raises(ConfigError, match="OneSize accepts 64x96 only"):
            export(checkpoint, tmp_path / "x.onnx", config=config, **options)
    assert export(checkpoint, tmp_path / "x.onnx", config=config).parity.passed


@pytest.mark.slow
def test_a_neck_is_the_pyramid_and_semantic_fpn_is_right_at_free_sizes(tmp_path):
    """MMSegmentation's Upsample would bake the traced size in."""
    cfg = own_config(
        backbone=FOUR,
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=4),
        decode_head=head(
            "FPNHead", in_channels=[8] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=8
        ),
    )
    checkpoint, config = plain_file(cfg, tmp_path / "iter_1.pth")
    made = export(checkpoint, tmp_path / "x.onnx", config=config, dynamic=True)
    assert list(made.cost["parts"]) == ["backbone", "pyramid", "head", "upsampling"]
    images = torch.randn(1, 3, 77, 131)
    wanted = own_inference(checkpoint, config, images)
    np.testing.assert_allclose(run(made.onnx, images), wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_head_with_a_second_output(tmp_path):
    """EncHead also guesses which classes are in the photo."""
    cfg = own_config(
        backbone=FOUR,
        decode_head=head(
            "EncHead",
            in_channels=[16, 32, 64],
            in_index=(1, 2, 3),
            channels=8,
            num_codes=4,
            use_se_loss=True,
            add_lateral=False,
            loss_se_decode=LOSS,
        ),
    )
    checkpoint, config = plain_file(cfg, tmp_path / "iter_1.pth")
    assert export(checkpoint, tmp_path / "x.onnx", config=config, size=SIZE).parity.passed


def test_cascades_are_refused(tmp_path):
    first = head("FCNHead", in_channels=64, in_index=3, channels=8, num_convs=1)
    cfg = own_config(
        backbone=FOUR,
        num_stages=2,
        decode_head=[first, head("OCRHead", in_channels=64, in_index=3, channels=8, ocr_channels=8)],
    )
    cfg.model.type = "CascadeEncoderDecoder"
    checkpoint, config = plain_file(cfg, tmp_path / "iter_1.pth")
    with pytest.raises(ConfigError, match="CascadeEncoderDecoder with 2 heads cannot be exported"):
        export(checkpoint, tmp_path / "x.onnx", config=config)


def test_a_foreign_backbone_alone_is_told_apart(files, tmp_path):
    cfg = own_config(backbone=FOUR, decode_head=head("FCNHead", in_channels=8, in_index=0, channels=8))
    _, config = plain_file(cfg, tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match="no decode head"):
        export(files.student, tmp_path / "x.onnx", config=config, part="backbone")
    made = export(tmp_path / "iter_1.pth", tmp_path / "x.onnx", config=config, part="backbone", size=(32, 64))
    assert made.output == "level0, level1, level2, level3"


def with_head(path, text, **model):
    """A segmentor.pth of ours with another head."""
    cfg = Config.fromstring(CONFIG.replace("NUM", "7"), ".py")
    cfg.merge_from_dict({"model": model})
    return plain_file(cfg, path)


@pytest.mark.slow
def test_levels_that_no_head_reads_are_not_computed(tmp_path):
    """An FCN on the stride-16 map: no transposed convolution, no block after the one it reads."""
    fcn = dict(_delete_=True, **head("FCNHead", in_channels=24, in_index=2, channels=8, num_convs=1))
    checkpoint, config = with_head(tmp_path / "iter_1.pth", CONFIG, decode_head=fcn)
    made = export(checkpoint, tmp_path / "x.onnx", config=config, size=SIZE)
    proto, cost = load_proto(made.onnx), made.cost
    assert cost["unread"] == ["level0", "level1", "level3"]
    assert not any(node.op_type in ("ConvTranspose", "MaxPool") for node in proto.graph.node)
    D, N = 24, 4 * 6
    T = N + 1
    assert cost["parts"]["backbone"]["macs"] == 768 * D * N + 3 * (12 * D * D * T + 2 * T * T * D)
    assert (cost["parts"]["pyramid"]["macs"], cost["parts"]["pyramid"]["params"]) == (0, 0)
    pieces = cut(Path(made.onnx).read_bytes(), {part: row["tensors"] for part, row in cost["parts"].items()})
    assert sum(len(piece.nodes) for piece in pieces.values()) == len(proto.graph.node)


@pytest.mark.slow
def test_one_block_needs_no_pyramid(tmp_path):
    linear = dict(
        _delete_=True, **head("FCNHead", in_channels=24, in_index=0, channels=24, num_convs=0, concat_input=False)
    )
    checkpoint, config = with_head(
        tmp_path / "iter_1.pth", CONFIG, backbone=dict(out_indices=(3,)), decode_head=linear, auxiliary_head=None
    )
    made = export(checkpoint, tmp_path / "x.onnx", config=config, dynamic=True)
    assert list(made.cost["parts"]) == ["backbone", "head", "upsampling"]
    assert made.cost["parts"]["head"] == {"params": 7 * 24 + 7, "macs": 7 * 24 * 24, "tensors": ["scores"]}
    images = torch.randn(1, 3, 57, 83)
    np.testing.assert_allclose(run(made.onnx, images), own_inference(checkpoint, config, images), atol=1e-5)
    (split,) = bench(made.onnx, split=True, runs=10, threads=1).splits
    assert [row.part for row in split.rows] == ["backbone", "head", "upsampling"]
