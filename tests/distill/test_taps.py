"""Taps of our ViT and of real timm architectures: equal to the model's own forward pass; nothing behind them runs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinymim.distill.taps import QKV, TAPS, read
from tinymim.errors import ConfigError
from tinymim.models import ViT
from tinymim.models.tokens import num_prefix, pair_tokens

SMALL = dict(embed_dim=48, num_heads=4, depth=3, num_classes=0, img_size=64)
TEACHERS = {  # timm name -> keywords; small and random, the real architecture
    "vit_base_patch16_224.mae": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "beitv2_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL | dict(img_size=56),
    "vit_small_patch14_reg4_dinov2": SMALL | dict(img_size=56),
    "vit_small_patch16_dinov3": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "samvit_base_patch16": SMALL | dict(global_attn_indexes=(2,), window_size=2),
}


def teacher(name):
    """A small model of a real architecture with random weights, evaluation mode."""
    torch.manual_seed(0)
    kwargs = dict(TEACHERS[name])
    model = timm.create_model(name.split(".")[0], **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    side = kwargs["img_size"]
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", TEACHERS)
def test_features_are_those_of_the_forward_pass(name):
    """Every tap of the last block, against the block's own input, output and normalisations seen by plain hooks."""
    model, images = teacher(name)
    block, seen = model.blocks[2], {}
    hooks = [
        block.register_forward_hook(lambda m, i, o: seen.update(input=i[0], output=o)),
        block.norm2.register_forward_hook(lambda m, i, o: seen.update(mid=i[0])),
    ]
    with torch.no_grad():
        model.forward_features(images)
    for hook in hooks:
        hook.remove()
    start, mid, end = (seen[key].reshape(2, -1, 48) for key in ("input", "mid", "output"))
    with torch.no_grad():
        taps = read(model, images, {3: TAPS})[3]
    torch.testing.assert_close(taps["output"], end)
    torch.testing.assert_close(taps["attn_post"], mid)
    torch.testing.assert_close(taps["attn_pre"], mid - start)
    torch.testing.assert_close(taps["ffn_pre"], end - mid)
    assert all(taps[key].shape == end.shape for key in QKV)
    assert end.shape[1] == num_prefix(model) + 16


@pytest.mark.parametrize("name", TEACHERS)
def test_attention_of_the_taps_is_the_models(name):
    """Attention of q, k, v (plus the bias the model adds) and its output projection give what the block adds."""
    model, images = teacher(name)
    given = {}
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        given["mask"], given["out"] = attn_mask, real(q, k, v, attn_mask=attn_mask, **options)
        given["shape"] = q.shape
        return given["out"]

    with torch.no_grad():
        taps = read(model, images, {3: QKV})[3]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            model.forward_features(images)
    q, k, v = (taps[key].unflatten(2, (4, 12)).transpose(1, 2) for key in QKV)
    mask = given["mask"]
    if mask is not None:
        mask = mask.reshape(-1, 4, *mask.shape[-2:]) if mask.ndim == 3 else mask
    torch.testing.assert_close(real(q, k, v, attn_mask=mask).reshape(given["out"].shape), given["out"])


@pytest.mark.parametrize("name", ["vit_base_patch16_224.mae", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_nothing_behind_the_deepest_tap_runs(name):
    model, images = teacher(name)
    with torch.no_grad():
        before = read(model, images, {1: ("output",), 2: QKV})
        del model.blocks[2:]
        model.blocks[1].mlp = None
        model.blocks[1].attn.proj = None
        after = read(model, images, {1: ("output",), 2: QKV})
    assert torch.equal(before[1]["output"], after[1]["output"])
    assert all(torch.equal(before[2][key], after[2][key]) for key in QKV)


def ours(**more):
    torch.manual_seed(0)
    model = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2, init_values=0.5, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_our_own_taps():
    model, images = ours(rel_pos_bias=True), torch.randn(2, 3, 64, 48)
    taps = read(model, images, {1: ("output",), 2: ("output",), 3: TAPS})
    x, (height, width) = model.embed(images)
    index = model.bias_index((height, width))
    for i in range(3):
        start, x = x, model.run_block(i, x, (height, width), index)
        torch.testing.assert_close(taps[i + 1]["output"], x)
    block = model.blocks[2]
    added = block.ls1(block.attn(block.norm1(start), (height, width), index))
    torch.testing.assert_close(taps[3]["attn_pre"], added)
    torch.testing.assert_close(taps[3]["attn_post"], start + added)
    torch.testing.assert_close(taps[3]["attn_post"] + taps[3]["ffn_pre"], x)


@pytest.mark.parametrize("name", ["ours", "vit_base_patch16_224.mae"])
def test_patches_left_out(name):
    """All patches in another order: the same tokens in that order. Some of them: what a model of fewer tokens gives."""
    model, images = (ours(), torch.randn(2, 3, 64, 64)) if name == "ours" else teacher(name)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        whole = read(model, images, {3: ("output",)})[3]["output"]
        mixed = read(model, images, {3: ("output",)}, order)[3]["output"]
        torch.testing.assert_close(
            mixed[:, 1:], whole[:, 1:].gather(1, order[..., None].expand(-1, -1, whole.shape[2]))
        )
        few = read(model, images, {3: ("output",)}, order[:, :4])[3]["output"]
    assert few.shape[1] == 5
    assert not torch.allclose(few[:, 0], whole[:, 0])


@pytest.mark.parametrize("name", ["vit_base_patch16_224.mae", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_what_a_block_adds_is_read_before_drop_path(name):
    """Stochastic depth of the teacher drops what is added to the stream, not what is compared."""
    from tinymim.distill.sources import add_drop_path

    model, images = teacher(name)
    with torch.no_grad():
        plain = read(model, images, {1: ("attn_pre",)})[1]["attn_pre"]
        for drop in add_drop_path(model, 0.999):
            drop.train()
        torch.testing.assert_close(read(model, images, {1: ("attn_pre",)})[1]["attn_pre"], plain)
        taps = read(model, images, {1: TAPS})[1]
    assert taps["ffn_pre"].abs().max() > 0
    torch.testing.assert_close(taps["output"], taps["attn_post"])  # all dropped


def test_windowed_blocks_of_sam():
    model, images = teacher("samvit_base_patch16")
    with torch.no_grad():
        taps = read(model, images, {1: ("attn_pre", "attn_post", "output")})[1]
        before = model.pos_drop(model.patch_embed(images) + model.pos_embed).flatten(1, 2)
    torch.testing.assert_close(before + taps["attn_pre"], taps["attn_post"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_base_patch16_xp_224", "does not apply attention first"),
        ("vit_dwee_patch16_reg1_gap_256", "uses differential attention"),
    ],
)
def test_other_kinds_of_blocks_are_refused(name, words):
    model = timm.create_model(name, **SMALL).eval()
    with pytest.raises(ConfigError) as error:
        read(model, torch.randn(1, 3, 64, 64), {1: QKV})
    assert words in f"{error.value.what} {error.value.why}"


def test_tokens_that_are_compared():
    for name, prefix, cls in (("vit_small_patch14_reg4_dinov2", 5, True), ("samvit_base_patch16", 0, False)):
        model, _ = teacher(name)
        x = torch.arange(16.0 + prefix).reshape(1, -1, 1)
        assert pair_tokens(x, model, False).flatten().tolist() == list(range(prefix, 16 + prefix))
        if cls:
            assert pair_tokens(x, model, True).flatten().tolist() == [0, *range(prefix, 16 + prefix)]


@pytest.mark.parametrize(
    ("name", "wanted", "keep", "words"),
    [
        ("vit_base_patch16_224.mae", {4: QKV}, False, "block 4 does not exist"),
        ("vit_base_patch16_224.mae", {0: QKV}, False, "block 0 does not exist"),
        ("vit_base_patch16_224.mae", {1: ("x",)}, False, "no tap 'x'"),
        ("samvit_base_patch16", {1: QKV}, False, "global attention: 3"),
        ("beit_base_patch16_224", {1: QKV}, True, "patches cannot be dropped"),
        ("eva02_tiny_patch14_224", {1: QKV}, True, "patches cannot be dropped"),
    ],
)
def test_what_cannot_be_read(name, wanted, keep, words):
    model, images = teacher(name)
    with pytest.raises(ConfigError) as error:
        read(model, images, wanted, torch.zeros(2, 4, dtype=torch.long) if keep else None)
    assert words in f"{error.value.what} {error.value.why} {error.value.fix}"


@pytest.mark.parametrize("names", [("q", "k"), ("v",)])
def test_only_the_wanted_of_qkv_are_computed(names):
    """The same values and gradients as from all three, with fewer products."""
    torch.manual_seed(0)
    model, images = ViT(img_size=32, embed_dim=48, depth=2, num_heads=4), torch.rand(2, 3, 32, 32)

    def run(wanted):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            taps = read(model, images, {2: wanted})[2]
        sum(taps[name].square().mean() for name in names).backward()
        return taps, model.blocks[1].attn.qkv.weight.grad.clone(), counter.get_total_flops()

    (all_three, grad, flops), (some, same_grad, fewer) = run(("q", "k", "v")), run(names)
    assert set(some) == set(names)
    for name in names:
        torch.testing.assert_close(some[name], all_three[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_grad, grad, rtol=1e-5, atol=1e-7)
    assert flops - fewer == (3 - len(names)) * 2 * 2 * 5 * 48 * 48
