"""CKA against its formula written out, its invariances, and what it refuses."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn

import tinymim
from tinymim.analysis.similarity import cka, u_centred
from tinymim.errors import ConfigError
from tinymim.models import ViT


def photos(count, seed=0, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def vit(seed=0, **more):
    torch.manual_seed(seed)
    model = ViT(**{"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, **more}).eval()
    for block in model.blocks:  # the initial ones add almost nothing to the stream
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.normal_(layer.weight, std=0.3)
    return model


def hsic(k, s):
    """Song et al., by loops over plain numbers."""
    n = len(k)
    k, s = ([[0.0 if i == j else float(m[i][j]) for j in range(n)] for i in range(n)] for m in (k, s))
    product = sum(k[i][j] * s[j][i] for i, j in itertools.product(range(n), repeat=2))
    sums = sum(map(sum, k)) * sum(map(sum, s)) / ((n - 1) * (n - 2))
    chain = sum(k[i][j] * s[j][m] for i, j, m in itertools.product(range(n), repeat=3))
    return (product + sums - 2 * chain / (n - 2)) / (n * (n - 3))


def features(model, images, block):
    found = model.forward_intermediates(images, indices=[block - 1], intermediates_only=True)[0].detach()
    return found.flatten(1).double()


def naive(model_a, model_b, batches, block_a, block_b):
    sums = [0.0, 0.0, 0.0]
    for for_a, for_b in batches:
        a, b = features(model_a, for_a, block_a), features(model_b, for_b, block_b)
        k, s = a @ a.T, b @ b.T
        sums = [old + new for old, new in zip(sums, (hsic(k, s), hsic(k, k), hsic(s, s)), strict=True)]
    return sums[0] / math.sqrt(sums[1] * sums[2])


def test_the_value_is_that_of_the_formula():
    """Several batches of several sizes; other patch size, photo size, prefix tokens and width; chosen blocks."""
    ours = vit()
    torch.manual_seed(1)
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=14, embed_dim=24, depth=3, num_heads=2, reg_tokens=2
    ).eval()
    batches = [(photos(n, n), photos(n, n, 40)[..., :28, :28]) for n in (4, 7)]
    found = cka(ours, other, iter(batches), blocks_a=[2], blocks_b=[3, 1])
    assert found.shape == (1, 2)
    for i, block in enumerate((3, 1)):
        assert float(found[0, i]) == pytest.approx(naive(ours, other, batches, 2, block), abs=1e-5)


def test_a_case_by_hand():
    """n = 4, K of features 0, 1, 3, 7 on a line: rows of the U-centred matrix sum to 0, and HSIC_1 is its square."""
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    centred = u_centred(x @ x.T)
    torch.testing.assert_close(centred.sum(1), torch.zeros(4, dtype=torch.float64))
    # off the diagonal K is 3 (2, 3), 7 (2, 4), 21 (3, 4), else 0; row sums 0, 10, 24, 28, all 62
    assert float(centred[0, 1]) == pytest.approx(0 - 0 / 2 - 10 / 2 + 62 / 6)
    assert float(centred.square().sum() / 4) == pytest.approx(hsic((x @ x.T).tolist(), (x @ x.T).tolist()))


def test_a_model_is_like_itself():
    found = cka(vit(), vit(), photos(12))
    torch.testing.assert_close(found.diagonal(), torch.ones(2))
    torch.testing.assert_close(found, found.T)
    assert 0 < found[0, 1] < 0.999


def test_rotation_and_scale_of_the_features_change_nothing():
    """The last layer of the last block writes the stream rotated and scaled."""
    images, other = photos(10), vit(seed=3)
    plain, turned = vit(depth=1), vit(depth=1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]

    class Turned(nn.Module):
        def forward(self, x, grid, index=None):
            return 7.5 * plain.blocks[0](x, grid, index) @ rotation

        def steps(self, x, grid, index):
            yield "output", self(x, grid, index)

    turned.blocks[0] = Turned()
    torch.testing.assert_close(cka(turned, other, images), cka(plain, other, images), atol=1e-5, rtol=0)
    assert float(cka(plain, turned, images)) == pytest.approx(1, abs=1e-5)
    skewed = cka(vit(depth=1, embed_dim=32), other, images)
    assert (skewed - cka(plain, other, images)).abs().max() > 0.01


def test_independent_features_are_near_nought_however_few_the_photos():
    """Photos that have nothing to do with each other; the biased estimate is far above 0 there."""
    model, batches = vit(), [(photos(6, i), photos(6, 1000 + i)) for i in range(60)]
    assert cka(model, model, batches).abs().max() < 0.15
    a, b = (features(model, x, 2) for x in batches[0])
    a, b = a - a.mean(0), b - b.mean(0)
    biased = ((a @ a.T) * (b @ b.T)).sum() / ((a @ a.T).norm() * (b @ b.T).norm())
    assert biased > 0.5


def test_photos_that_are_all_alike_have_no_similarity():
    model = vit()
    assert cka(model, model, photos(1).expand(6, -1, -1, -1)).isnan().all()


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (photos(3), {}, "a batch of 3"),
        ([(photos(5), photos(6))], {}, "a batch of 5 and 6"),
        ([], {}, "no images"),
        (photos(4), {"blocks_a": [3]}, "block 3 does not exist"),
        (photos(4), {"blocks_b": [0]}, "block 0 does not exist"),
        (photos(4), {"blocks_b": []}, "no blocks to compare"),
    ],
)
def test_what_is_refused(images, options, words):
    model = vit()
    with pytest.raises(ConfigError, match=words):
        cka(model, model, images, **options)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no blocks to compare"):
        cka(vit(), nn.Conv2d(3, 3, 1), photos(4))


def test_public_names():
    assert tinymim.analysis.cka is cka
    assert callable(tinymim.analysis.attention_stats)
    assert tinymim.analysis.cka is cka  # its module has another name, and does not hide it
