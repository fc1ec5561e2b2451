"""Frozen networks prepared for a run: the same numbers, in less time."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinymim.distill import TinyMIM
from tinymim.distill.frozen import PackedLinear, can_pack, prepare_frozen
from tinymim.models import ViT

SMALL = dict(img_size=32, embed_dim=48, depth=2, num_heads=4)
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch has no packed products")
NAMES = ("vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224")


def teachers():
    yield ViT(**SMALL)
    for name in NAMES:
        size = 28 if "14" in name else 32
        yield timm.create_model(name, img_size=size, depth=2, embed_dim=48, num_heads=4)


def losses(teacher, dtype, prepared, targets="qk+vv"):
    torch.manual_seed(1)
    patch = teacher.patch_embed.patch_size
    size = 28 if patch in (14, (14, 14)) else 32
    student = ViT(**{**SMALL, "img_size": size, "patch_size": size // 2})
    method = TinyMIM(student, teacher, targets=targets)
    if prepared:
        method.prepare(dtype)
    images = torch.rand(3, 3, size, size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return {name: float(loss.detach()) for name, loss in method(images, images).items()}


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("number", range(4))
def test_a_prepared_teacher_gives_the_same_losses(number, dtype, near):
    torch.manual_seed(number)
    teacher = list(teachers())[number]
    for p in teacher.parameters():  # as if trained: relations that are not flat
        nn.init.normal_(p, std=0.1)
    targets = ("qk+vv", "output")
    before, after = (losses(teacher, dtype, prepared, targets) for prepared in (False, True))
    assert after == pytest.approx(before, rel=near)
    assert min(before.values()) > 1e-4


def test_what_is_prepared():
    """Weights of products have the type of the run and need no cast; norms keep float32."""
    model = ViT(**SMALL).requires_grad_(False).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_frozen(model, torch.bfloat16)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == {
        n for n in state if "norm" in n or n in ("cls_token", "pos_embed")
    }
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight.float(), state["blocks.0.attn.qkv.weight"], rtol=0.01, atol=0
    )


@needs_packing
@pytest.mark.parametrize("gelu", [False, True])
def test_a_packed_product(gelu):
    torch.manual_seed(0)
    layer = nn.Linear(48, 96).requires_grad_(False)
    x_BTD = torch.randn(2, 5, 48).transpose(0, 1)
    want = nn.functional.gelu(layer(x_BTD)) if gelu else layer(x_BTD)
    with FlopCounterMode(display=False) as counter:
        got = PackedLinear(layer, torch.float32, gelu=gelu)(x_BTD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    assert counter.get_total_flops() == 2 * 10 * 48 * 96


def test_preparing_draws_no_random_numbers():
    """What follows from the seed of a run stays."""
    can_pack.cache_clear()
    model = ViT(**SMALL).requires_grad_(False)
    before = torch.get_rng_state()
    prepare_frozen(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
