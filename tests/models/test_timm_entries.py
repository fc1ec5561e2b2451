"""timm.create_model of our names: arguments and methods mean what they mean in timm; names and tags are checked."""

import pytest
import timm
import torch

import tinymim
from tinymim.errors import ConfigError
from tinymim.models import save_student
from tinymim.models.logit_teacher import load_label_teacher
from tinymim.models.teachers import load_teacher
from tinymim.models.timm_names import check_name

NAME, SMALL = "tinymim_vit_tiny", dict(depth=2, img_size=32)


def build(**arguments):
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL, **arguments).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (2, 192)),
        (dict(num_classes=0), (2, 192)),
        (dict(num_classes=10), (2, 10)),
        (dict(num_classes=10, in_chans=1, drop_rate=0.1), (2, 10)),
        (dict(num_classes=0, global_pool=""), (2, 5, 192)),
        (dict(num_classes=3, global_pool="avg"), (2, 3)),
        (dict(pretrained_cfg=dict(num_classes=7)), (2, 7)),
    ],
)
def test_shapes(arguments, shape):
    model = build(**arguments)
    images = torch.randn(2, arguments.get("in_chans", 3), 32, 32)
    assert model(images).shape == shape
    assert model.forward_head(model.forward_features(images)).shape == shape
    assert model(torch.randn(2, images.shape[1], 50, 70)).shape[0] == 2  # every size, as our own models


@torch.no_grad()
def test_features_only_and_methods():
    maps = build(num_classes=10, in_chans=1, features_only=True, out_indices=(0, -1))
    assert [x.shape for x in maps(torch.randn(1, 1, 32, 32))] == [(1, 192, 2, 2)] * 2
    assert maps.feature_info.channels() == [192, 192]
    model = build(num_classes=4)
    assert model.get_classifier().out_features == 4
    model.reset_classifier(6)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 6)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)
    assert not timm.list_models("tinymim_*", pretrained=True)


@torch.no_grad()
def test_the_same_weights_and_function_as_ours(tmp_path):
    """Initial weights and those of a student file; channels are adapted as timm does it."""
    ours = tinymim.create_model(NAME, **SMALL).eval()
    save_student(ours, tmp_path / "s.pth")
    images = torch.randn(1, 3, 32, 32)
    theirs = build(checkpoint=tmp_path / "s.pth", num_classes=5)
    torch.testing.assert_close(theirs.forward_features(images), ours(images))
    grey = build(checkpoint=tmp_path / "s.pth", in_chans=1)
    weight = ours.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, weight)
    torch.testing.assert_close(build().pos_embed, ours.pos_embed)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        (NAME, dict(pretrained=True), "no weights to download"),
        (NAME, dict(nothing=1), "nothing"),
        (NAME, dict(global_pool="bad"), "cannot build"),
        (NAME, dict(pretrained_cfg="no_tag"), "no_tag"),
        (NAME, dict(num_heads=5), "cannot build"),
        (NAME, dict(rel_pos_bias=True, num_classes=10), "'num_classes'"),
        ("tinymim_vit_star_tiny", dict(features_only=True), "'features_only'"),
        ("tinymim_vit_star_tiny", dict(in_chans=1), "'in_chans'"),
    ],
)
def test_what_a_model_lacks_is_refused_by_name(name, arguments, said):
    with pytest.raises(ConfigError, match=said):
        timm.create_model(name, **SMALL, **arguments)


def test_parts_that_timm_lacks_are_ours():
    assert timm.create_model("tinymim_vit_star_tiny", **SMALL, num_classes=0).num_prefix_tokens == 2
    assert timm.create_model(NAME, **SMALL, rel_pos_bias=True).rel_pos_bias


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_base_patch16_224.maee", "did you mean timm/vit_base_patch16_224.mae"),
        ("vit_base_patch16_224.", "none of its tags"),
        ("vit_bas_patch16_224.mae", "vit_base_patch16_224"),
        ("hf-hub:someone/something", "no name is similar"),
        ("", "no name is similar"),
        (NAME, "--teacher-weights FILE"),
    ],
)
def test_names_and_tags_are_checked_without_a_network(name, said, monkeypatch):
    from tinymim import hub

    def never(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub.socket, "create_connection", never)
    for load in (lambda: load_teacher(f"timm/{name}"), lambda: load_label_teacher(f"timm/{name}", ["a", "b"])):
        with pytest.raises(ConfigError) as error:
            load()
        assert said in str(error.value)


def test_a_name_without_timm_in_front():
    with pytest.raises(tinymim.errors.CheckpointError, match="did you mean timm/vit_base_patch16_224"):
        load_teacher("vit_base_patch16_224.mae")
    check_name("timm/vit_base_patch16_224.mae", download=True)
