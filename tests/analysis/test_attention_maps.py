"""Attention distance and entropy: maps known by hand, and the maps of real blocks written out."""

import math

import pytest
import timm
import torch
from torch import nn

from tinymim.analysis import attention_stats
from tinymim.analysis.attention_maps import patch_distances
from tinymim.errors import ConfigError
from tinymim.models import ViT

IMAGES = torch.randn(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def vit(**more):
    torch.manual_seed(0)
    return ViT(**{"img_size": (48, 64), "embed_dim": 24, "depth": 2, "num_heads": 2, **more}).eval()


def test_distances_of_a_grid():
    expected = torch.tensor([[0, 1, 1, 2**0.5], [1, 0, 2**0.5, 1], [1, 2**0.5, 0, 1], [2**0.5, 1, 1, 0]])
    torch.testing.assert_close(patch_distances((2, 2)), expected)
    assert patch_distances((3, 5))[0, 14] == pytest.approx(math.hypot(2, 4))


@pytest.mark.parametrize(("patch", "size"), [(16, (48, 64)), (14, (42, 56)), (16, (41, 50))])
def test_uniform_attention_has_the_mean_distance_and_the_largest_entropy(patch, size):
    """A 3 x 4 grid, also of a photo that is padded to it; in pixels of the model's own patches."""
    model = vit(patch_size=patch, dist_token=True)
    nn.init.zeros_(model.blocks[1].attn.qkv.weight)
    stats = attention_stats(model, IMAGES[..., : size[0], : size[1]])
    apart = [math.dist((a // 4, a % 4), (b // 4, b % 4)) for a in range(12) for b in range(12)]
    torch.testing.assert_close(stats["distance"][1], torch.full((2,), patch * sum(apart) / 144))
    torch.testing.assert_close(stats["entropy"][1], torch.full((2,), math.log(12)))
    assert (stats["entropy"][0] < math.log(12) - 1e-6).all()


def test_attention_to_itself_has_no_distance_and_no_entropy():
    """Keys equal queries, which are the positions alone, large and all of one length."""
    model = vit(depth=1, num_heads=1, embed_dim=16, img_size=48)
    block = model.blocks[0]
    block.norm1 = nn.Identity()
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.pos_embed[0, 1:] = 100 * torch.eye(16)[:9]
        block.attn.qkv.weight.copy_(torch.eye(16).repeat(3, 1))
        model.pos_embed[0, 0] = 1000  # every query would choose the class token, were it a key
    stats = attention_stats(model, IMAGES[..., :48])
    torch.testing.assert_close(stats["distance"], torch.zeros(1, 1))
    torch.testing.assert_close(stats["entropy"], torch.zeros(1, 1))


@pytest.mark.parametrize("kind", ["table", "timm"])
def test_the_maps_are_those_of_the_blocks_without_prefix_tokens(kind):
    """A bias table, register tokens; several batches of several sizes count by their photos."""
    if kind == "table":
        model = vit(rel_pos_bias=True)
        for block in model.blocks:
            nn.init.normal_(block.attn.relative_position_bias_table)
    else:
        shape = dict(img_size=(48, 64), embed_dim=24, depth=2, num_heads=2, reg_tokens=2)
        model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    stats = attention_stats(model, iter([IMAGES[:1], IMAGES[1:]]))
    for i, block in enumerate(model.blocks):
        seen = []
        handle = block.attn.qkv.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model.forward_features(IMAGES)
        handle.remove()
        q, k, _ = seen[0].unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4).double()
        scores = q @ k.transpose(-2, -1) / 12**0.5
        if kind == "table":
            scores = scores + model.attention_bias(i, (3, 4))
        first = model.num_prefix_tokens
        maps = scores.softmax(-1)[..., first:, first:]
        maps = maps / maps.sum(-1, keepdim=True)
        for head in range(2):
            distance = [
                maps[n, head, a, b] * 16 * math.dist((a // 4, a % 4), (b // 4, b % 4))
                for n in range(3)
                for a in range(12)
                for b in range(12)
            ]
            assert float(stats["distance"][i, head]) == pytest.approx(float(sum(distance)) / 36, rel=1e-4)
            entropy = -torch.xlogy(maps[:, head], maps[:, head]).sum(-1).mean()
            assert float(stats["entropy"][i, head]) == pytest.approx(float(entropy), rel=1e-4)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="no images"):
        attention_stats(vit(), [])
    with pytest.raises(ConfigError, match="adds a bias"):
        attention_stats(timm.create_model("beit_base_patch16_224", img_size=48, embed_dim=24, depth=1), IMAGES)
    with pytest.raises(ConfigError, match="attention maps of a Conv2d"):
        attention_stats(nn.Conv2d(3, 3, 1), IMAGES)
