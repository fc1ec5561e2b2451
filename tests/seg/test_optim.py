"""Layer decay: the published scales, who is decayed, the published quirks, DDP, frozen parameters."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from tinymim.errors import ConfigError
from tinymim.seg import TinyMIMBackbone


class Segmentor(nn.Module):
    """A 12-block backbone and the two parameters of heads that the golden file names."""

    def __init__(self):
        super().__init__()
        self.backbone = TinyMIMBackbone(
            img_size=32,
            embed_dim=24,
            num_heads=2,
            rel_pos_bias=True,
            init_values=1.0,
            dist_token=True,
            last_dim=32,
            pyramid_dim=24,
        )
        self.decode_head, self.auxiliary_head = nn.Module(), nn.Module()
        self.decode_head.conv_seg, self.auxiliary_head.conv_seg = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)


def build(model, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="TinyMIMLayerDecayOptimizerConstructor",
            paramwise_cfg=paramwise,
        ),
    )


def by_name(model, wrapper):
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["lr_scale"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("decay", [0.65, 0.75, 0.8])
def test_golden_scales(golden, decay):
    model = Segmentor()
    found = by_name(model, build(model, layer_decay=decay))
    numbers, _ = golden("layer_decay")
    for name, scale in numbers[str(decay)].items():
        assert found[name][1] == scale, name
        assert found[name][0] == 1e-4 * scale, name


def test_every_trainable_parameter_once_and_decay_only_on_matrices():
    model = Segmentor()
    model.backbone.blocks[3].requires_grad_(False)
    found = by_name(model, build(model, layer_decay=0.8))
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (_, _, decay) in found.items():
        free = name.endswith(
            (
                "bias",
                "gamma",
                "_token",
                "pos_embed",
                "norm1.weight",
                "norm2.weight",
                "fpn1.1.weight",
                "conv1x1.0.weight",
                "bias_table",
            )
        )
        assert decay == (0.0 if free else 0.05), name
    assert found["backbone.dist_token"][1] == pytest.approx(0.8**13)


def test_published_quirks():
    model = Segmentor()
    usual = by_name(model, build(model, layer_decay=0.8))
    quirks = by_name(model, build(model, layer_decay=0.8, published_quirks=True))
    changed = {name for name in usual if usual[name] != quirks[name]}
    tables = {f"backbone.blocks.{i}.attn.relative_position_bias_table" for i in range(12)}
    assert changed == tables | {"backbone.cls_token", "backbone.pos_embed", "backbone.dist_token"}
    assert quirks["backbone.dist_token"] == (1e-4, 1.0, 0.05)
    assert quirks["backbone.pos_embed"][1:] == (0.8**13, 0.05)


def test_a_wrapped_model_gives_the_same_groups():
    model = Segmentor()
    wrapped = nn.Module()
    wrapped.module = model
    assert by_name(model, build(wrapped, layer_decay=0.8)) == by_name(model, build(model, layer_decay=0.8))


def test_a_step_and_a_state_dict_round_trip():
    model = Segmentor()
    wrapper = build(model, layer_decay=0.8)
    loss = sum(level.square().mean() for level in model.backbone(torch.randn(2, 3, 32, 32)))
    wrapper.update_params(loss)
    build(model, layer_decay=0.8).load_state_dict(wrapper.state_dict())


@pytest.mark.parametrize("wrong", [dict(decay_rate=0.8), dict(layer_decay=0.0), dict(layer_decay=1.5, num_layers=12)])
def test_unknown_options(wrong):
    with pytest.raises(ConfigError, match="paramwise_cfg"):
        build(Segmentor(), **wrong)


def test_another_backbone():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="get_layer_id"):
        build(model, layer_decay=0.8)
