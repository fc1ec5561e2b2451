"""The contract of a backbone: who keeps it, layers and weight decay, the list of backbones, no hidden changes."""

import copy

import pytest
import torch
from torch import nn

import tinymim
from tinymim.distill import read
from tinymim.errors import ConfigError
from tinymim.models import Backbone, Stage, register_backbone
from tinymim.models import backbone as contract
from tinymim.models.backbone import Layers, Shell, TapByTap, backbone_names, decay_groups, from_config, pick_taps
from tinymim.models.checkpoints import read_checkpoint, save_student, stored_shape
from tinymim.models.classifier import Classifier
from tinymim.models.vit import ARGUMENTS, ViT

TINY = dict(img_size=32, embed_dim=24, depth=3, num_heads=2)
MODELS = {  # name -> arguments of a small one
    "vit": TINY,
    "tinymim_vit_star_tiny": dict(img_size=32, depth=2, last_dim=40),
    "hiera_tiny_224": dict(img_size=(32, 64), embed_dim=16, stages=(1, 2, 1, 1)),
    "hiera_small_abswin_256": dict(img_size=64, embed_dim=16, stages=(1, 1, 1, 1)),
    "swin_tiny_patch4_window7_224": dict(img_size=(32, 64), embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
    "tiny_vit_5m_224": dict(img_size=64, embed_dims=(16, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_backbone_keeps_the_contract(name, tmp_path):
    torch.manual_seed(0)
    model = from_config({"name": name, **MODELS[name]}).eval()
    assert isinstance(model, Backbone)
    assert {*model.must_match} <= {*model.config}
    assert model.stage_info[-1].blocks.stop == model.depth
    images = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        final = model.forward_map(images)
    for i, found in enumerate(maps):
        stage = next(stage for stage in model.stage_info if i in stage.taps)
        wide = found.shape[1] if i == len(maps) - 1 and model.config.get("last_dim") else stage.width
        assert found.shape == (2, wide, -(-50 // stage.stride), -(-70 // stage.stride))
    assert final.shape == maps[-1].shape
    layers = Layers(model)
    assert layers.above == model.depth + 1
    assert {layers.of(key) for key, _ in model.named_parameters()} - {layers.above} == set(range(model.depth + 1))
    again = from_config(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict())
    save_student(model, tmp_path / "student.pth")
    loaded, _ = tinymim.models.model_from_checkpoint(tmp_path / "student.pth", say=False)
    with torch.no_grad():
        for other in (again, loaded, copy.deepcopy(model)):
            assert torch.equal(other.forward_map(images), final)
            assert other.config == model.config


@pytest.mark.parametrize("name", MODELS)
def test_nothing_behind_a_tap_gets_a_gradient(name):
    torch.manual_seed(0)
    model = from_config({"name": name, **MODELS[name]})
    count = model.stage_info[-1].taps.stop
    for index in range(count - 1):
        model.requires_grad_(True).zero_grad()
        for part in model.parts_after(index):
            part.requires_grad_(False)
        found = model.forward_intermediates(
            torch.randn(2, 3, 64, 64), indices=[index], stop_early=True, intermediates_only=True
        )
        found[0].square().mean().backward()
        frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
        unreached = {key for key, p in model.named_parameters() if p.grad is None}
        assert frozen
        assert unreached - frozen <= {key for key in unreached if key.startswith("conv1x1.")}
        assert frozen <= unreached


def test_a_toy_backbone_is_one_class(monkeypatch):
    """What a new file must bring; the segmentation plug-in and layer decay need nothing else."""
    monkeypatch.setattr(contract, "_BUILDERS", dict(contract._BUILDERS))  # forget it afterwards

    @register_backbone("toy")
    class Toy(nn.Module):
        must_match = ("width",)
        num_prefix_tokens = 0
        depth = 1

        def __init__(self, *, img_size=32, width=8, drop_path_rate=0.0):
            super().__init__()
            self.config, self.img_size = dict(name="toy", img_size=img_size, width=width), (img_size, img_size)
            self.stem = nn.Conv2d(3, width, 16, 16)
            self.layers = nn.ModuleList([nn.Conv2d(width, width, 1)])
            self.stage_info = (Stage(width, 16, range(1), range(1)),)

        def forward_intermediates(self, images, indices=None, **_):
            pick_taps(self, indices)
            return [self.layers[0](self.stem(images))]

        def forward_map(self, images):
            return self.forward_intermediates(images)[0]

        def parts_after(self, index, tap="output"):
            return []

        def group_matcher(self, coarse=False):
            return dict(stem="stem", blocks=r"layers\.(\d+)")

        def no_weight_decay(self):
            return ()

        def set_grad_checkpointing(self, enable=True):
            pass

    from tinymim.seg import TinyMIMBackbone

    assert isinstance(tinymim.create_model("toy", img_size=32), Backbone)
    backbone = TinyMIMBackbone(name="toy", width=12, out_indices=(0,))
    assert backbone(torch.zeros(1, 3, 32, 32))[0].shape == (1, 12, 2, 2)
    assert [backbone.get_layer_id(f"backbone.{key}.weight") for key in ("stem", "layers.0")] == [0, 1]


def test_unknown_names_and_arguments():
    with pytest.raises(ConfigError, match="hiera_tiny_224"):
        tinymim.create_model("hiera_tiny")
    with pytest.raises(ConfigError, match="depht"):
        from_config({"depht": 3})
    with pytest.raises(ConfigError, match="depht"):
        tinymim.create_model("tiny_vit_5m_224", depht=3)
    with pytest.raises(ConfigError, match="indices"):
        from_config(TINY).forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[3])
    with pytest.raises(ConfigError, match="no layer"):
        Layers(from_config(TINY)).of("blocks.3.norm1.weight")
    assert {"vit", "tinymim_vit_tiny", "hiera_base_224", "tiny_vit_21m_384"} <= set(backbone_names())


def test_groups_split_layers_and_weight_decay():
    model = from_config({**TINY, "rel_pos_bias": True})
    model.blocks[1].requires_grad_(False)
    groups = decay_groups(model.named_parameters(), Layers(model).of, model.no_weight_decay())
    names = {(group.layer, group.decayed): group.names for group in groups}
    assert set(names) == {(i, decayed) for i in (0, 1, 3) for decayed in (True, False)} | {(4, False)}
    assert names[0, True] == ["patch_embed.proj.weight"]
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias"} == set(names[0, False])
    assert "blocks.0.attn.relative_position_bias_table" in names[1, False]
    assert names[4, False] == ["norm.weight", "norm.bias"]


def test_the_arguments_of_a_vit_are_its_constructors():
    assert tuple(ViT(**TINY).config) == ARGUMENTS
    assert isinstance(ViT(**TINY), TapByTap)


def test_a_shell_shows_what_it_holds():
    inner = ViT(**TINY)
    shell = Shell(inner)
    assert list(shell.state_dict()) == list(inner.state_dict())
    assert [n for n, _ in shell.named_parameters()] == [n for n, _ in inner.named_parameters()]
    assert shell.embed_dim == 24
    assert not shell.eval().inner.training
    meta = copy.deepcopy(shell).to("meta")
    assert {p.device.type for p in (*meta.parameters(), meta.inner.pos_embed)} == {"meta"}
    assert shell.pos_embed is inner.pos_embed
    assert inner.pos_embed.device.type == "cpu"
    with pytest.raises(AttributeError, match="nothing"):
        _ = shell.nothing


def test_a_classifier_leaves_the_backbone_as_it_is():
    backbone = ViT(**TINY)
    images = torch.randn(1, 3, 32, 32)
    before = backbone(images)
    classifier = Classifier(backbone, 3)
    assert torch.equal(backbone(images), before)
    assert isinstance(backbone.norm, nn.LayerNorm)
    assert not [key for key in classifier.state_dict() if key.startswith("backbone.norm.")]
    assert classifier.backbone.blocks is backbone.blocks


def test_reading_a_teacher_leaves_it_as_it_is():
    import timm

    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    for block, fused in zip(teacher.blocks, (False, True), strict=True):
        block.attn.fused_attn = fused
    read(teacher, torch.randn(1, 3, 32, 32), {1: ("q", "output"), 2: ("attn_pre",)})
    assert [block.attn.fused_attn for block in teacher.blocks] == [False, True]


def test_another_head_count_is_said_of_a_copy(tmp_path):
    torch.save(ViT(**TINY).state_dict(), tmp_path / "foreign.pth")
    foreign = read_checkpoint(tmp_path / "foreign.pth")
    assert (foreign.config, stored_shape(foreign)["embed_dim"], stored_shape(foreign)["num_heads"]) == ({}, 24, None)
    assert foreign.regrouped(4).config == {"num_heads": 4}
    assert foreign.config == {}
    tinymim.load_weights(ViT(**{**TINY, "num_heads": 4}), foreign.regrouped(4), say=False)
    save_student(ViT(**TINY), tmp_path / "ours.pth")
    ours = read_checkpoint(tmp_path / "ours.pth")
    tinymim.load_weights(ViT(**{**TINY, "num_heads": 4}), ours.regrouped(4), say=False)
    assert (ours.config["num_heads"], ours.regrouped(4).config["num_heads"]) == (2, 4)
