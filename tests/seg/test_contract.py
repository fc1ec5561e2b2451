"""Hierarchical models go from a config to a trained segmentor and a verified ONNX file."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import tinymim
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import read_checkpoint, save_student
from tinymim.seg import TinyMIMBackbone, load_segmentor, train_segmentor
from tinymim.seg.backbone import check_student
from tinymim.seg.config import config_text, find_config
from tinymim.seg.shape import take_shape
from tinymim_export import export
from tinymim_export.precision.quantize import quantize

SMALL = {  # name -> config, a smaller model, widths
    "hiera_tiny_224": ("upernet_hiera_tiny_camvid", dict(embed_dim=16, stages=(1, 2, 2, 1)), [16, 32, 64, 128]),
    "swin_tiny_patch4_window7_224": (
        "upernet_swin_tiny_camvid",
        dict(embed_dim=12, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4)),
        [12, 24, 48, 96],
    ),
    "tiny_vit_5m_224": (
        "upernet_tinyvit_5m_camvid",
        dict(embed_dims=(16, 32, 64, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4)),
        [16, 32, 64, 64],
    ),
}


def options():
    """--cfg-options of two steps; the student's file tells the small model's arguments and widths."""
    return {
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
        "train_dataloader.batch_size": 2,
        "train_dataloader.num_workers": 0,
        "val_dataloader.num_workers": 0,
        "train_dataloader.dataset.pipeline.2.scale": (96, 96),
        "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
        "model.data_preprocessor.size": (64, 64),
        "model.backbone.img_size": (64, 64),
        "model.decode_head.channels": 16,
        "model.auxiliary_head.channels": 16,
    }


def small(name, **more):
    return TinyMIMBackbone(name=name, **SMALL[name][1], **{"img_size": 64, **more})


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_from_a_config_to_a_verified_file(name, scenes, tmp_path, capsys):
    torch.manual_seed(0)
    student = tinymim.create_model(name, img_size=(96, 64), **SMALL[name][1])
    save_student(student, tmp_path / "student.pth")
    result = train_segmentor(
        SMALL[name][0],
        work_dir=tmp_path / "run",
        data_root=scenes,
        student=tmp_path / "student.pth",
        device="cpu",
        cfg_options=options(),
    )
    assert 0 <= result.miou <= 1
    told = [key for key in student.state_dict() if not key.endswith("num_batches_tracked")]
    assert f"loaded {len(told)} tensors" in capsys.readouterr().out
    segmentor, _ = load_segmentor(result.files["segmentor"])
    moved = [
        key
        for key, value in student.state_dict().items()
        if value.is_floating_point() and not torch.equal(segmentor.state_dict()[f"backbone.{key}"], value)
    ]
    assert any(key.endswith("weight") for key in moved)
    fixed = export(result.files["segmentor"], tmp_path / "fixed.onnx", size=(64, 96))
    assert fixed.parity.passed
    calibration = scenes / "images" / "training"
    int8 = quantize(fixed.onnx, tmp_path / "int8.onnx", precision="int8", calibration=calibration, count=6)
    assert int8.verified
    assert int8.layers["MatMul"] >= 4 * student.depth - 8  # TinyViT has convolutions in its first stage


def test_the_student_decides_the_shape_when_it_begins_and_when_it_is_resumed(tmp_path, capsys):
    """What the config sets itself stays, and is refused later if it contradicts."""
    name, widths = "swin_tiny_patch4_window7_224", SMALL["swin_tiny_patch4_window7_224"][2]
    save_student(tinymim.create_model(name, img_size=64, **SMALL[name][1]), tmp_path / "student.pth")
    begun = find_config("upernet_swin_tiny_camvid")
    take_shape(begun, tmp_path / "student.pth", None)
    assert {key: begun.model.backbone[key] for key in SMALL[name][1]} == SMALL[name][1]
    assert begun.model.decode_head.in_channels == widths
    assert begun.model.auxiliary_head.in_channels == widths[2]
    assert "embed_dim=12" in capsys.readouterr().out
    (tmp_path / "config.py").write_text(config_text(begun), "utf-8")
    resumed = find_config("upernet_swin_tiny_camvid")
    take_shape(resumed, None, tmp_path)
    assert resumed.model == begun.model
    own = find_config("upernet_swin_tiny_camvid")
    own.model.backbone.embed_dim = 24
    take_shape(own, tmp_path / "student.pth", None)
    assert own.model.backbone.embed_dim == 24
    with pytest.raises(ConfigError, match=r"embed_dim=12 \(the config has 24\)"):
        check_student(build_backbone(own), read_checkpoint(tmp_path / "student.pth"))
    for other in ("upernet_hiera_tiny_camvid", "upernet_tinymim_t"):
        untouched = find_config(other)
        take_shape(untouched, tmp_path / "student.pth", None)
        assert untouched.model == find_config(other).model


def build_backbone(cfg):
    return TinyMIMBackbone(**{key: value for key, value in cfg.model.backbone.items() if key != "type"})


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_files_of_free_size_and_of_a_student_alone(name, tmp_path):
    torch.manual_seed(0)
    save_student(tinymim.create_model(name, img_size=(96, 64), **SMALL[name][1]), tmp_path / "student.pth")
    made = export(tmp_path / "student.pth", tmp_path / "student.onnx", dynamic=True)
    assert (made.part, made.output, made.size, made.parity.passed) == ("backbone", "features", (96, 64), True)


@pytest.mark.parametrize("name", SMALL)
def test_levels_of_any_size_pass_through(name):
    backbone = small(name).eval()
    assert (backbone.fpn_names, backbone.out_channels) == ((), tuple(SMALL[name][2]))
    for height, width in ((64, 64), (33, 70), (1, 200), (96, 128)):
        with torch.no_grad():
            levels = backbone(torch.randn(1, 3, height, width))
        assert [tuple(x.shape) for x in levels] == [
            (1, D, -(-height // s), -(-width // s)) for D, s in zip(SMALL[name][2], (4, 8, 16, 32), strict=True)
        ]


@pytest.mark.parametrize("name", SMALL)
def test_names_are_timms_and_every_parameter_learns_once(name):
    backbone = small(name, drop_path_rate=0.2, with_cp=True)
    model = tinymim.create_model(name, img_size=64, **SMALL[name][1])
    assert list(backbone.state_dict()) == list(model.state_dict())
    assert [n for n, _ in backbone.named_parameters()] == [n for n, _ in model.named_parameters()]
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_and_evaluation_change_nothing(name):
    plain = small(name).eval()
    saving = small(name, with_cp=True).eval()
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        if model is saving:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        sum(level.square().mean() for level in model(images)).backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    copy.deepcopy(plain)(images)  # timm keeps a table between calls that could not be copied


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [("hiera_tiny_224", "pos_embed"), ("tiny_vit_5m_224", "_biases"), ("swin_tiny_patch4_window7_224", "_bias_table")],
)
def test_layers_and_weight_decay(name, undecayed):
    model = nn.Module()
    model.backbone, model.decode_head = small(name), nn.Conv2d(2, 2, 1)
    depth = model.backbone.depth
    ids = {n: model.backbone.get_layer_id(n) for n, _ in model.backbone.named_parameters()}
    assert set(ids.values()) == set(range(depth + 1))
    assert ids["patch_embed.conv1.conv.weight" if "tiny_vit" in name else "patch_embed.proj.weight"] == 0
    last = {"h": "blocks.5", "s": "layers.3.blocks.0", "t": "stages.3.blocks.0"}[name[0]]
    assert ids[f"{last}.mlp.fc1.bias"] == depth
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="TinyMIMLayerDecayOptimizerConstructor",
            paramwise_cfg=dict(layer_decay=0.5),
        ),
    )
    seen = {
        name: group
        for group in wrapper.optimizer.param_groups
        for name in group["param_names"]
        if name.startswith("backbone.") or name == "decode_head.weight"
    }
    assert seen["decode_head.weight"]["lr_scale"] == 1.0
    for key, layer in ids.items():
        group = seen[f"backbone.{key}"]
        assert group["lr_scale"] == 0.5 ** (depth + 1 - layer)
        assert (group["weight_decay"] > 0) == (
            dict(model.backbone.named_parameters())[key].ndim > 1 and undecayed not in key
        )


def test_weights_of_another_size_and_of_another_model(tmp_path):
    state = tinymim.create_model("hiera_tiny_224", img_size=(96, 64), **SMALL["hiera_tiny_224"][1])
    save_student(state, tmp_path / "student.pth")
    backbone = small("hiera_tiny_224", img_size=128)
    assert tinymim.load_weights(backbone, tmp_path / "student.pth", say=False).resized == ["pos_embed"]
    same = small("hiera_tiny_224", img_size=(96, 64)).eval()
    tinymim.load_weights(same, tmp_path / "student.pth", say=False)
    for _ in range(2):  # at load and at run time by one function
        images = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            for a, b in zip(backbone.eval()(images), same(images), strict=True):
                torch.testing.assert_close(a, b)
    again, file = tinymim.models.model_from_checkpoint(tmp_path / "student.pth", say=False)
    assert (file.config["name"], again.img_size, again.depth) == ("hiera_tiny_224", (96, 64), 6)
    for model in (small("tiny_vit_5m_224"), TinyMIMBackbone(name="hiera_tiny_224", img_size=64)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match="does not fit"):
            tinymim.load_weights(model, tmp_path / "student.pth")
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    plain = tinymim.create_model("tinymim_vit_tiny", img_size=32, depth=2)
    with pytest.raises(CheckpointError, match="looks like hiera_tiny_224"):
        tinymim.load_weights(plain, tmp_path / "student.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(name="resnet_of_nobody"), "no backbone"),
        (dict(name="hiera_tiny_224", embed_dimm=16), "embed_dimm"),
        (dict(name="hiera_tiny_224", pyramid_dim=32), "without a pyramid"),
        (dict(name="hiera_tiny_224", out_indices=(0, 2)), "out_indices"),
        (dict(embed_dimm=24), "embed_dimm"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ConfigError, match=words):
        TinyMIMBackbone(**{"img_size": 64, **change})


def test_one_stage_is_one_level_and_what_follows_is_frozen():
    backbone = small("hiera_tiny_224", out_indices=(2,))
    (level,) = backbone(torch.randn(2, 3, 64, 64))
    level.square().mean().backward()
    assert level.shape == (2, 64, 4, 4)
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == name.startswith("blocks.5."), name
