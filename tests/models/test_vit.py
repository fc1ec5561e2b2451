"""The plain ViT: shapes at any size, taps with timm's meaning, agreement with timm, relative positions, masks."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tinymim
from tinymim.cli._listed import BACKBONES, MODELS
from tinymim.errors import ConfigError
from tinymim.models import ViT, attention, model_names
from tinymim.models.backbone import PLAIN, backbone_names
from tinymim.models.mae import MAE
from tinymim.models.position import relative_index, resize_position, resize_relative_table, sincos_position

TINY = dict(img_size=64, embed_dim=24, depth=3, num_heads=2)
FULL = TINY | dict(rel_pos_bias=True, init_values=0.5, dist_token=True, last_dim=40)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 100), width=st.integers(1, 100), full=st.booleans())
def test_any_size(height, width, full):
    """Tokens and maps have ceil(size / 16) patches whatever the size."""
    model = ViT(**(FULL if full else TINY)).eval()
    grid = (-(-height // 16), -(-width // 16))
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        tokens = model(images)
        maps = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert tokens.shape == (1, (2 if full else 1) + grid[0] * grid[1], 40 if full else 24)
    assert [m.shape for m in maps] == [(1, 24, *grid), (1, 40 if full else 24, *grid)]


def test_padding_is_zeros_at_the_bottom_and_right():
    model = randomise(ViT(**TINY))
    images = torch.randn(2, 3, 50, 33)
    padded = torch.zeros(2, 3, 64, 48)
    padded[:, :, :50, :33] = images
    torch.testing.assert_close(model(images), model(padded))


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_equals_timm(init_values):
    """timm's VisionTransformer with our weights under the same names gives the same tokens and taps."""
    ours = randomise(ViT(img_size=64, embed_dim=48, depth=3, num_heads=3, init_values=init_values))
    theirs = timm.models.VisionTransformer(
        img_size=64, embed_dim=48, depth=3, num_heads=3, init_values=init_values, num_classes=0, global_pool=""
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval().forward_features(images), rtol=1e-5, atol=1e-5)
        for norm, fmt in itertools.product((False, True), ("NCHW", "NLC")):
            kwargs = dict(indices=[0, 2], norm=norm, output_fmt=fmt, intermediates_only=True)
            for a, b in zip(
                ours.forward_intermediates(images, **kwargs),
                theirs.forward_intermediates(images, **kwargs),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        last, taps = ours.forward_intermediates(images, indices=1, return_prefix_tokens=True)
        assert last.shape == (2, 17, 48)
        assert taps[0][1].shape == (2, 1, 48)


def test_drop_path_schedules():
    linear = ViT(**TINY, drop_path_rate=0.2)
    assert [getattr(b.drop_path, "drop_prob", 0) for b in linear.blocks] == [0, 0.1, 0.2]
    chosen = ViT(**TINY, drop_path_rate=[0.1, 0.1, 0.0])
    assert [getattr(b.drop_path, "drop_prob", 0) for b in chosen.blocks] == [0.1, 0.1, 0]


def test_gradient_checkpointing_changes_nothing():
    model = randomise(ViT(**FULL)).train()
    images = torch.randn(2, 3, 64, 64)
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(images).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_relative_index_rules():
    """The published bucket numbers for class and distillation tokens (golden/README)."""
    index = relative_index((2, 3), 2)
    rows = 3 * 5 + 6
    assert index.shape == (8, 8)
    assert index[0, 0] == rows - 1
    assert set(index[0, 1:].tolist()) == {rows - 3}
    assert set(index[1:, 0].tolist()) == {rows - 2}
    assert index[1, 1] == rows - 4
    assert set(index[1, 2:].tolist()) == {rows - 6}
    assert set(index[2:, 1].tolist()) == {rows - 5}
    patch = index[2:, 2:]
    for i, j in itertools.product(range(6), repeat=2):
        assert patch[i, j] == (i // 3 - j // 3 + 1) * 5 + (i % 3 - j % 3 + 2)


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), prefix=st.integers(1, 2))
def test_relative_index_is_a_permutation_of_rows(h, w, prefix):
    index = relative_index((h, w), prefix)
    rows = (2 * h - 1) * (2 * w - 1) + 3 * prefix
    assert set(index.flatten().tolist()) == set(range(rows))


def test_resizing_follows_the_rule():
    """Bicubic, align_corners=False, no antialias; extra rows kept; the same grid is the identity."""
    pos = sincos_position((4, 4), 24, 2)
    pos[:, :2] = 7.0
    out = resize_position(pos, (4, 4), (3, 6), 2)
    assert out.shape == (1, 20, 24)
    assert torch.equal(out[:, :2], pos[:, :2])
    expected = torch.nn.functional.interpolate(
        pos[:, 2:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2), size=(3, 6), mode="bicubic", align_corners=False
    )
    assert torch.equal(out[:, 2:], expected.flatten(2).transpose(1, 2))
    assert resize_position(pos, (4, 4), (4, 4), 2) is pos
    table = torch.randn(7 * 7 + 3, 2)
    resized = resize_relative_table(table, (4, 4), (3, 5))
    assert resized.shape == (5 * 9 + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])


def test_mae_masks_and_learns():
    """The loss looks at hidden patches only, and one batch can be learnt."""
    torch.manual_seed(0)
    mae = MAE(ViT(**TINY), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    images = torch.randn(4, 3, 64, 64)
    order = torch.rand(4, 16).argsort(1)
    before = float(mae.losses(images, order)["loss"].detach())
    changed = mae.patchify(images)
    assert changed.shape == (4, 16, 768)
    optimizer = torch.optim.Adam([p for p in mae.parameters() if p.requires_grad], 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = mae.losses(images, order)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.9 * before


def test_listed_models_are_what_is_built():
    with torch.device("meta"):
        built = [tinymim.create_model(name) for name in model_names()]
    assert [*MODELS] == [
        (name, m.embed_dim, m.num_heads, m.depth, round(sum(p.numel() for p in m.parameters()) / 1e6, 1))
        for name, m in zip(model_names(), built, strict=True)
    ]
    assert {*BACKBONES} == {*backbone_names()} - {*model_names(), PLAIN}


def test_create_model():
    assert tinymim.create_model("tinymim_vit_small").num_heads == 6
    star = tinymim.create_model("tinymim_vit_star_tiny", img_size=(64, 96))
    assert (star.num_heads, star.num_prefix_tokens, star.num_features) == (12, 2, 1280)
    assert timm.create_model("tinymim_vit_tiny", img_size=64).embed_dim == 192
    with pytest.raises(ConfigError, match="did you mean 'tinymim_vit_base'"):
        tinymim.create_model("tinymim_vit_bas")
    with pytest.raises(ConfigError, match="no_such"):
        tinymim.create_model("tinymim_vit_base", no_such=1)
    with pytest.raises(ConfigError, match="num_heads"):
        ViT(embed_dim=64, num_heads=3)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_products_is_the_fused_one(masked):
    """In bfloat16 on the CPU: values and gradients as near to float32's as those of PyTorch's fused kernel."""
    torch.manual_seed(0)
    q, k, v, along = (torch.randn(2, 3, 65, 16) for _ in range(4))
    mask = torch.randn(1, 3, 65, 65) if masked else None

    def run(attend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, None if mask is None else mask.to(dtype))
        return [out, *torch.autograd.grad(out, inputs, along.to(dtype))]

    exact = run(F.scaled_dot_product_attention, torch.float32)
    fused, ours = (run(f, torch.bfloat16) for f in (F.scaled_dot_product_attention, attention.attention))
    for want, theirs, got in zip(exact, fused, ours, strict=True):
        error, usual = (float((x.float() - want).norm() / want.norm()) for x in (got, theirs))
        assert error < max(2 * usual, 0.01)
    calls = []
    many = torch.randn(1, 1, attention.EXPLICIT_TOKENS + 1, 8, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.F, "scaled_dot_product_attention", lambda q, *_, **__: calls.append(len(q)) or q)
        for x in (q, q.bfloat16(), many):
            attention.attention(x, x, x)
    assert calls == [2, 1]  # float32, and too many tokens
