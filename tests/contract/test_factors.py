"""Factors make models smaller, and a smaller model's weights are cut from the larger one's by the stated rule."""

import pytest
import torch

from tinymim.contract.factors import factors, kind_of, smallest, written_out
from tinymim.contract.inherit import inherit
from tinymim.contract.limits import Limits, amount
from tinymim.contract.weights import count
from tinymim.errors import ConfigError
from tinymim.models import ViT, create_model
from tinymim.models.backbone import from_config
from tinymim.models.classifier import Classifier

TINY = dict(embed_dims=[32, 64, 64, 128], depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], mlp_ratio=2.0)
MODELS = {
    "plain": lambda: ViT(img_size=32, embed_dim=48, depth=3, num_heads=3),
    "tables and scales": lambda: ViT(
        img_size=(32, 48), embed_dim=32, depth=2, num_heads=2, rel_pos_bias=True, init_values=0.1
    ),
    "star": lambda: create_model("tinymim_vit_star_tiny", img_size=32, depth=2, embed_dim=48),
    "tiny_vit": lambda: create_model("tiny_vit_5m_224", img_size=224, **TINY),
}
PLAIN = [name for name in MODELS if name != "tiny_vit"]
SMALLEST = {("star", "E"), *(("tiny_vit", name) for name in ("N2", "N4", "W4"))}


def drawn(model):
    """A model with every weight drawn, those that start at zero or one too."""
    torch.manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.05)
    return model.eval()


@pytest.mark.parametrize("name", [*PLAIN, pytest.param("tiny_vit", marks=pytest.mark.slow)])
def test_every_factor_makes_a_smaller_model_that_runs(name):
    model = drawn(MODELS[name]())
    config = written_out(model)
    images = torch.rand(1, 3, 64, 32)
    params, macs = count(config)
    assert params == sum(p.numel() for p in model.parameters())
    for factor in factors(config):
        smaller = factor.shrink(config)
        if smaller is None:
            assert (name, factor.name) in SMALLEST
            continue
        assert factor.value(smaller) < factor.value(config)
        fewer = count(smaller)
        assert max(fewer[0] - params, fewer[1] - macs) <= 0 < params + macs - sum(fewer), factor.name
        child = inherit(smaller, model, config)
        assert written_out(child) == smaller
        assert child.forward_map(images).isfinite().all()
    assert sum(count(smallest(config))) < 0.5 * (params + macs)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_not_smaller_inherits_everything(name):
    model = drawn(MODELS[name]())
    child = inherit(written_out(model), model, written_out(model))
    assert child.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, child.state_dict()[key]) for key, value in model.state_dict().items())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(child.forward_map(images), model.forward_map(images))


@pytest.mark.parametrize("name", MODELS)
def test_a_classifier_keeps_its_head(name):
    model = drawn(MODELS[name]())
    config, images = written_out(model), torch.rand(2, 3, 64, 64)
    whole = drawn(Classifier(model, 5))
    assert torch.equal(inherit(config, whole, config)(images), whole(images))
    for factor in factors(config):
        if (smaller := factor.shrink(config)) is not None:
            child = inherit(smaller, whole, config)
            assert child(images).shape == (2, 5)
            assert {*child.last_layer.weight.flatten().tolist()} <= {*whole.last_layer.weight.flatten().tolist()}
            assert torch.equal(child.last_layer.bias, whole.last_layer.bias)


def test_hidden_units_and_blocks_with_the_largest_norm_stay():
    """What adds nothing is dropped, so the outputs stay."""
    model = drawn(MODELS["plain"]())
    config, images = written_out(model), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            for unit in torch.randperm(192)[: 48 // 2]:
                block.mlp.fc1.weight[unit], block.mlp.fc2.weight[:, unit] = 0.0, 0.0
    narrow = inherit({**config, "mlp_ratio": 3.5}, model, config)
    assert torch.allclose(narrow.forward_map(images), model.forward_map(images), atol=1e-5)
    with torch.no_grad():
        for layer in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            layer.weight.zero_(), layer.bias.zero_()
    shallow = inherit({**config, "depth": 2}, model, config)
    assert torch.equal(shallow.blocks[1].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
    assert torch.equal(shallow.forward_map(images), model.forward_map(images))


def test_heads_and_channels_with_the_largest_norm_stay_together():
    """Queries, keys, values and the projection keep the same heads, and every layer the same channels."""
    model = drawn(MODELS["plain"]())
    config = written_out(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.view(3, 3, 16, 48)[:, 1] *= 1e-3  # the second of three heads
            block.attn.proj.weight.view(48, 3, 16)[:, 1] *= 1e-3
        weak = torch.arange(0, 48, 3)  # channels that are nearly nowhere
        for key, value in model.state_dict().items():
            if key.endswith(("proj.weight", "fc2.weight")):
                value[weak] *= 1e-3
            if key.endswith(("qkv.weight", "fc1.weight")):
                value[:, weak] *= 1e-3
        model.pos_embed[..., weak] *= 1e-3
    child = inherit(factors(config)[0].shrink(config), model, config)
    channels = torch.tensor([i for i in range(48) if i % 3])
    own, theirs = child.blocks[1].attn, model.blocks[1].attn
    rows = theirs.qkv.weight.view(3, 3, 16, 48)[:, [0, 2]][..., channels]
    assert torch.equal(own.qkv.weight, rows.reshape(96, 32))
    assert torch.equal(own.proj.weight, theirs.proj.weight.view(48, 3, 16)[channels][:, [0, 2]].reshape(32, 32))
    assert torch.equal(child.norm.weight, model.norm.weight[channels])


def test_a_smaller_window_keeps_the_biases_of_its_distances():
    model = drawn(MODELS["tiny_vit"]())
    config = written_out(model)
    smaller = {f.name: f for f in factors(config)}["W3"].shrink(config)
    assert smaller["window_sizes"] == [7, 7, 7, 7]
    child = inherit(smaller, model, config)
    own, theirs = child.stages[2].blocks[0].attn, model.stages[2].blocks[0].attn
    tokens = torch.tensor([a * 14 + b for a in range(7) for b in range(7)])  # the first window within the larger one
    inside = theirs.attention_biases[:, theirs.attention_bias_idxs][:, tokens][:, :, tokens]
    assert torch.equal(own.attention_biases[:, own.attention_bias_idxs], inside)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "swin_tiny_patch4_window7_224"])
def test_other_families_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be contracted"):
        kind_of({"name": name})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "tiny_vit"])
def test_counts_are_those_of_an_export(name):
    from tinymim_export.graph.cost import pieces
    from tinymim_export.graph.torch_model import TorchModel

    model = drawn(MODELS[name]())
    config = written_out(model)
    smaller = from_config(factors(config)[0].shrink(config)).eval()
    found = pieces(TorchModel(smaller, "backbone", ("features",), None, smaller.img_size, {}), smaller.img_size)
    part = found.parts["backbone"]
    assert (part.params, part.macs) == count(written_out(smaller))


@pytest.mark.parametrize(
    ("text", "value"), [("5.4M", 5.4e6), ("5400000", 5.4e6), ("5,400,000", 5.4e6), ("1.3g", 1.3e9), (" 90 k ", 9e4)]
)
def test_counts_have_units(text, value):
    assert amount(text, "--params") == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("15ms", 15.0), ("15", 15.0), ("0.015s", 15.0), ("900us", 0.9)])
def test_times_have_units(text, value):
    assert amount(text, "--latency", time=True) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-3M", "5.4Q", "M", "nan", "inf", "0", "15ms", "1e999"])
def test_other_counts_are_refused(text):
    with pytest.raises(ConfigError, match="--params"):
        amount(text, "--params")


def test_limits_tell_how_far_a_model_is_over():
    limits = Limits(params=1e6, latency_ms=10.0)
    assert limits.over(1e6, 9e9, 10.0) == {} == limits.over(5e5, 9e9)
    assert set(limits.over(2e6, 1, 20.0)) == {"params", "latency_ms"}
    assert str(limits) == "1 M parameters, 10 milliseconds"
