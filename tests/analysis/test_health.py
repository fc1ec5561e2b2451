"""Relations by head, attention entropy and outliers, each against a direct computation."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.analysis.health import (
    LAYERS,
    OUTLIER_LIMIT,
    activation_outliers,
    attention_entropy,
    head_kl,
    method_head_kl,
    outlier,
)
from tinymim.distill import TinyMIM, relation_losses
from tinymim.errors import ConfigError
from tinymim.models import ViT

IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _same_models():
    torch.manual_seed(0)


def vit(**more):
    return ViT(**{"img_size": 48, "embed_dim": 24, "depth": 3, "num_heads": 2, **more}).eval()


def timm_vit(**more):
    shape = {"img_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 4, **more}
    return timm.create_model("vit_tiny_patch16_224", **shape).eval()


@settings(max_examples=30, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 9), scale=st.floats(0.1, 30))
def test_the_mean_over_heads_is_the_loss(heads, tokens, scale):
    torch.manual_seed(tokens)
    student, teacher = ({name: torch.randn(2, tokens, width) * scale for name in "qkv"} for width in (8, 12))
    relations = ("qk", "vv", "qq", "kk")
    losses = relation_losses(student, teacher, heads, relations)
    for name, kl_M in head_kl(student, teacher, heads, relations).items():
        assert kl_M.shape == (heads,)
        torch.testing.assert_close(kl_M.mean(), losses[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        (lambda: vit(embed_dim=32, num_heads=4), {}),
        (lambda: vit(embed_dim=32, num_heads=4), {"targets": ["qk+vv@2:1", "qk@3", "output"]}),
        (lambda: timm_vit(reg_tokens=2), {}),
        (lambda: timm_vit(patch_size=8, img_size=24), {"align": "image"}),
        (lambda: timm_vit(patch_size=8), {"align": "tokens", "class_token": False}),
    ],
)
def test_heads_of_a_method_are_its_losses(teacher, options):
    """Same names, and each the mean of its heads: other patch sizes, registers, several blocks."""
    method = TinyMIM(vit(), teacher(), **options).eval()
    losses = method.losses(IMAGES, IMAGES)
    found = method_head_kl(method, IMAGES, IMAGES)
    assert set(found) == {name for name in losses if name[:2] in ("qk", "vv")}
    for name, kl_M in found.items():
        assert kl_M.shape == (4,)
        torch.testing.assert_close(kl_M.mean(), losses[name], rtol=1e-4, atol=1e-6)


def test_a_method_without_relations_has_no_heads():
    assert method_head_kl(TinyMIM(vit(), vit(), targets=["output"]), IMAGES, IMAGES) == {}


@pytest.mark.parametrize("make", [lambda: vit(rel_pos_bias=True, depth=2), timm_vit, lambda: timm_vit(qk_norm=True)])
def test_entropy_is_that_of_the_maps_the_model_uses(make, monkeypatch):
    """Against the softmax of what enters the fused attention, bias table included."""
    model, expected = make(), []
    for block in model.blocks:
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
    fused = F.scaled_dot_product_attention

    def note(q, k, v, attn_mask=None, **more):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        maps = (scores if attn_mask is None else scores + attn_mask).softmax(-1).double()
        expected.append(-torch.xlogy(maps, maps).sum(-1).mean((0, 2)))
        return fused(q, k, v, attn_mask=attn_mask, **more)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", note)
        model.forward_features(IMAGES)
    nats, share = attention_entropy(model, IMAGES)
    torch.testing.assert_close(nats.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(share, nats / math.log(10))


def test_entropy_is_largest_where_all_tokens_are_alike():
    model = vit()
    torch.nn.init.zeros_(model.blocks[1].attn.qkv.weight)
    share = attention_entropy(model, IMAGES)[1]
    torch.testing.assert_close(share[1], torch.ones(2))
    assert (share[[0, 2]] < 1).all()


def test_entropy_refuses_attention_with_a_bias_it_does_not_see():
    beit = timm.create_model("beit_base_patch16_224", img_size=48, embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(ConfigError, match="adds a bias"):
        attention_entropy(beit, IMAGES)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 3000), width=st.integers(1, 12), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_outlier_is_what_numpy_says(tokens, width, seed, scale):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * scale
    found, size = outlier(x), np.sort(np.abs(x.numpy()), axis=0)
    assert found.largest == pytest.approx(size.max())
    assert size[:, found.channel].max() == size.max()
    per_channel = size[min(round(0.999 * tokens), tokens - 1)]
    assert found.usual == pytest.approx(np.quantile(per_channel, 0.9), rel=1e-5)


def test_outlier_of_nothing():
    assert outlier(torch.zeros(5, 3)).ratio == 1
    spike = torch.zeros(5000, 3)
    spike[7, 2] = 1
    assert outlier(spike) == (1, 0, 2)
    assert outlier(spike).ratio == math.inf


@torch.no_grad()
def plant(model, ratio, channel=5):
    """One channel in front of every qkv, proj and fc1 at ``ratio`` times the usual; the model computes the same."""
    for name in ("qkv", "fc1", "proj"):
        for i, block in enumerate(model.blocks):
            seen = []
            layer = block.get_submodule(LAYERS[name])
            handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            model.forward_features(IMAGES)
            handle.remove()
            found = activation_outliers(model, IMAGES)[i][name]
            factor = ratio * found.usual / float(seen[0][..., channel].abs().max())
            if name == "proj":
                rows = slice(2 * model.embed_dim + channel, 2 * model.embed_dim + channel + 1)
                parts = [block.attn.qkv.weight[rows], block.attn.qkv.bias[rows]]
            else:
                norm = block.norm1 if name == "qkv" else block.norm2
                parts = [norm.weight[channel], norm.bias[channel]]
            for part in parts:
                part *= factor
            layer.weight[:, channel] /= factor
    return model


@torch.no_grad()
def int8_error(model):
    """Error of the features with all inputs of linear layers in INT8, one scale a tensor; share of their variance."""
    exact = model.forward_features(IMAGES)

    def cut(_, args):
        scale = args[0].abs().max() / 127
        return ((args[0] / scale).round() * scale,)

    handles = [
        block.get_submodule(path).register_forward_pre_hook(cut) for block in model.blocks for path in LAYERS.values()
    ]
    error = float((model.forward_features(IMAGES) - exact).square().mean() / exact.var())
    for handle in handles:
        handle.remove()
    return error


def test_a_planted_outlier_is_found_and_the_quantile_of_the_whole_tensor_is_blind():
    model = vit(embed_dim=96)
    before = model(IMAGES)
    ordinary = activation_outliers(model, IMAGES)
    plant(model, 40.0)
    torch.testing.assert_close(model(IMAGES), before, rtol=1e-3, atol=1e-4)
    for then, now in zip(ordinary, activation_outliers(model, IMAGES), strict=True):
        assert max(o.ratio for o in then.values()) < 4
        for name in ("qkv", "proj", "fc1"):
            assert now[name].ratio == pytest.approx(40, rel=0.1)
            assert now[name].channel == 5
        assert max(now[name].ratio for name in ("fc2", "stream")) < 4
    seen = []
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten()))
    model(IMAGES)
    assert seen[0].max() / seen[0].quantile(0.999) < 3


@pytest.mark.parametrize("ratio", [10, 20, 40])
def test_arithmetic_of_the_limit(ratio):
    """Bell-shaped ordinary values keep 42.5 - 20 log10 r dB beside an outlier, as the docstring says."""
    x = torch.randn(4000, 96, generator=torch.Generator().manual_seed(0))
    x[0, 7] = ratio * outlier(x).usual
    scale = x.abs().max() / 127
    ordinary = x.abs() < x.abs().max()
    noise = ((x / scale).round() * scale - x)[ordinary].square().mean()
    assert 10 * math.log10(x[ordinary].square().mean() / noise) == pytest.approx(42.5 - 20 * math.log10(ratio), abs=1)


def test_at_the_limit_int8_costs_about_a_hundredth():
    errors = [int8_error(plant(vit(embed_dim=96, depth=4), ratio)) for ratio in (4, OUTLIER_LIMIT, 100)]
    assert errors[0] < 0.002
    assert 0.003 < errors[1] < 0.03
    assert errors[2] > 0.1
