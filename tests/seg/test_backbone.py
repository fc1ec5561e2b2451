"""The segmentation backbone: golden numbers, any size, layer ids, bad options, loading."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinymim
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import save_student
from tinymim.models.classifier import Classifier, save_classifier
from tinymim.models.vit import ViT
from tinymim.seg import TinyMIMBackbone

TINY = dict(img_size=64, embed_dim=24, depth=4, num_heads=2, out_indices=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("seg_backbone_base", {}, 2e-6),
        # The golden array itself lies 3.5e-6 from the float64 result (12 layers, 1280 x 9 products a sum), and the
        # published operations in the published order give 2.07e-6 on an AVX2 processor: 2e-6 is below the rounding.
        ("seg_backbone_star_t", dict(dist_token=True, last_dim=1280, pyramid_dim=768), 4e-6),
    ],
)
def test_golden(golden, name, options, tolerance):
    numbers, arrays = golden(name)
    config = {k: v for k, v in numbers["config"].items() if k != "use_abs_pos_emb"}
    config["rel_pos_bias"] = config.pop("use_rel_pos_bias")
    backbone = TinyMIMBackbone(**config, **options, norm_cfg=dict(type="SyncBN")).eval()
    report = tinymim.load_weights(backbone, golden.state("backbone/", numbers["shapes"]))
    assert not report.missing
    assert not report.unexpected
    assert len(report.loaded) == len(numbers["shapes"])
    size = config["img_size"]
    images = np.random.RandomState(numbers["input_seed"]).standard_normal((1, 3, size, size)).astype("float32")
    with torch.no_grad():
        levels = backbone(torch.from_numpy(images))
    for i, level in enumerate(levels):
        wanted = arrays[f"out{i}"]
        assert level.shape == wanted.shape
        assert np.abs(level.numpy() - wanted).max() <= tolerance * np.abs(wanted).max()


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), wide=st.booleans())
def test_levels_have_ceil_sizes_for_any_image(height, width, wide):
    options = dict(dist_token=True, last_dim=40, pyramid_dim=32) if wide else {}
    backbone = TinyMIMBackbone(**TINY, **options, rel_pos_bias=True).eval()
    with torch.no_grad():
        levels = backbone(torch.randn(1, 3, height, width))
    sizes = [tuple(level.shape[-2:]) for level in levels]
    assert sizes == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
    assert {level.shape[1] for level in levels} == {32 if wide else 24}


def test_padding_is_zeros_at_the_bottom_and_right():
    backbone = TinyMIMBackbone(**TINY).eval()
    images = torch.randn(1, 3, 50, 70)
    padded = torch.nn.functional.pad(images, (0, 10, 0, 14))
    with torch.no_grad():
        for small, large in zip(backbone(images), backbone(padded), strict=True):
            assert torch.equal(small, large[..., : small.shape[-2], : small.shape[-1]])


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = TinyMIMBackbone(**TINY, rel_pos_bias=True, init_values=1.0)
    saving = TinyMIMBackbone(**TINY, rel_pos_bias=True, init_values=1.0, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        sum(level.square().mean() for level in model(images)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_every_parameter_of_the_used_blocks_gets_a_gradient_and_the_rest_is_frozen():
    backbone = TinyMIMBackbone(**{**TINY, "depth": 6}, rel_pos_bias=True, init_values=1.0)
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in backbone.named_parameters():
        unused = name.startswith(("blocks.4", "blocks.5"))
        assert (parameter.grad is None) == unused, name
        assert parameter.requires_grad != unused, name


def test_layer_ids():
    backbone = TinyMIMBackbone(**TINY, rel_pos_bias=True, dist_token=True, last_dim=40, pyramid_dim=32)
    ids = {name: backbone.get_layer_id(name) for name, _ in backbone.named_parameters()}
    assert ids["cls_token"] == ids["dist_token"] == ids["pos_embed"] == ids["patch_embed.proj.bias"] == 0
    assert ids["blocks.2.attn.relative_position_bias_table"] == 3
    assert ids["conv1x1.1.weight"] == ids["fpn1.1.weight"] == ids["fpn3.weight"] == 5
    assert backbone.get_layer_id("backbone.blocks.3.mlp.fc2.bias") == 4
    for wrong in ("blocks.4.norm1.weight", "decode_head.conv_seg.weight", "blocks", "pos_embedding"):
        with pytest.raises(ConfigError, match="no layer"):
            backbone.get_layer_id(wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(patch_size=8), "patch_size"),
        (dict(out_indices=(0, 1, 2)), "out_indices"),
        (dict(out_indices=(3, 5, 7, 11)), "out_indices"),
        (dict(out_indices=(1, 0, 2, 3)), "out_indices"),
        (dict(last_dim=40), "pyramid_dim"),
        (dict(init_cfg=dict(type="Xavier")), "init_cfg"),
        (dict(num_heads=5), "num_heads"),
    ],
)
def test_bad_options(change, words):
    with pytest.raises(ConfigError, match=words):
        TinyMIMBackbone(**{**TINY, **change})


def test_init_cfg_loads_a_student_and_says_when_there_is_none(tmp_path, capsys):
    student = ViT(img_size=32, embed_dim=24, depth=4, num_heads=2)
    save_student(student, tmp_path / "student.pth", {})
    backbone = TinyMIMBackbone(**TINY, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "student.pth")))
    backbone.init_weights()
    assert torch.equal(backbone.blocks[2].mlp.fc1.weight, student.blocks[2].mlp.fc1.weight)
    assert "resized: pos_embed" in capsys.readouterr().out
    TinyMIMBackbone(**TINY).init_weights()
    assert "from scratch" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["PT", "FT", "Tstar", "ours"])
def test_published_layouts_and_our_classifiers(layout, tmp_path):
    """TinyMIM-PT, -FT and -FT-Tstar as the authors wrote them, and a classifier.pth: the trunk arrives, all of it."""
    star = dict(dist_token=True, last_dim=40) if layout == "Tstar" else {}
    shape = dict(img_size=64, embed_dim=24, depth=4, num_heads=2, **star)
    trunk = ViT(**shape)
    tuned = Classifier(ViT(**shape), 5)
    state = (
        trunk.state_dict()
        if layout == "PT"
        else {k.removeprefix("backbone."): v for k, v in tuned.state_dict().items()}
    )
    path = tmp_path / "file.pth"
    if layout == "ours":
        save_classifier(tuned, path, "abcde")
    else:
        torch.save({"model": state, "epoch": 99}, path)
    wide = dict(pyramid_dim=32, **star) if star else {}
    backbone = TinyMIMBackbone(**TINY, **wide, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    backbone.init_weights()
    own = backbone.state_dict()
    for key, value in state.items():
        if not key.startswith(("norm.", "head", "fc_norm")):
            assert torch.equal(own[key], value), key
    assert len(backbone(torch.randn(1, 3, 64, 64))) == 4


def test_another_head_count_names_the_option(tmp_path):
    save_student(ViT(img_size=32, embed_dim=24, depth=4, num_heads=4), tmp_path / "student.pth", {})
    backbone = TinyMIMBackbone(**TINY, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "student.pth")))
    with pytest.raises(ConfigError, match=r"--cfg-options model\.backbone\.num_heads=4"):
        backbone.init_weights()


def test_a_file_of_another_model_is_an_error(tmp_path):
    torch.save({"state_dict": {"stem.conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    backbone = TinyMIMBackbone(**TINY, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "other.pth")))
    with pytest.raises(CheckpointError):
        backbone.init_weights()


def test_positional_arguments_keep_the_published_order():
    """As callers of 0.1 wrote them; twice or too many is a TypeError."""
    values = (64, 16, 24, 4, 2, True, 0.1, 0.0, (0, 1, 2, 3), dict(type="BN"))
    backbone = TinyMIMBackbone(*values)
    assert (backbone.config["embed_dim"], backbone.depth, backbone.config["num_heads"]) == (24, 4, 2)
    assert (backbone.config["rel_pos_bias"], backbone.config["init_values"]) == (True, 0.1)
    assert backbone.out_indices == (0, 1, 2, 3)
    with pytest.raises(TypeError, match="'img_size' twice"):
        TinyMIMBackbone(64, img_size=32)
    with pytest.raises(TypeError, match="17 positional"):
        TinyMIMBackbone(*range(17))


def test_a_frozen_backbone_learns_nothing_but_its_pyramid_does():
    torch.manual_seed(0)
    backbone = TinyMIMBackbone(**TINY, frozen=True, drop_path_rate=0.5, norm_cfg=dict(type="BN")).train()
    trained = {name.partition(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"fpn1", "fpn2"}
    images = torch.randn(2, 3, 64, 64)
    a, b = backbone.trunk(images), backbone.trunk(images)
    assert all(torch.equal(x, y) and not x.requires_grad for x, y in zip(a, b, strict=True))  # no drop path
    assert not backbone.blocks[0].training
    assert backbone.fpn1[1].training
    assert backbone.eval().train().blocks[0].training is False


def test_one_tap_may_have_any_stride():
    backbone = TinyMIMBackbone(img_size=56, patch_size=14, embed_dim=24, depth=4, num_heads=2, out_indices=(2,))
    (level,) = backbone(torch.randn(1, 3, 60, 40))
    assert level.shape == (1, 24, 5, 3)
