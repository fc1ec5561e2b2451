"""k-NN and linear probe against direct computations; which block is embedded."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.analysis.probes import embed, embed_blocks, knn_accuracy, linear_probe, trained_depth
from tinymim.distill import TinyMIM
from tinymim.models import ViT
from tinymim.models.mae import MAE


def clusters(count, spread, seed=0, classes=3, width=8):
    """Points around a centre a class."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=random), labels


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), k=st.integers(1, 25), seed=st.integers(0, 1000), temperature=st.floats(0.05, 1))
def test_knn_is_a_vote_of_neighbours(count, k, seed, temperature):
    train, labels = clusters(count, 1.0, seed)
    val, truth = clusters(20, 1.0, seed + 1)
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (train, val)]
    right, unclear = 0, 0
    for own, label in zip(unit[1], truth.tolist(), strict=True):
        cosine = unit[0] @ own
        votes = np.zeros(3)
        for i in np.argsort(-cosine)[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        right += int(votes.argmax() == label)
        ordered = np.sort(votes)
        unclear += int(ordered[-1] - ordered[-2] < 1e-4 * ordered[-1])
    found = knn_accuracy(train, labels, val, truth, k=k, temperature=temperature)
    assert abs(found * 20 - right) <= unclear + 1e-6


def test_linear_probe_separates_what_can_be_separated():
    train, val = clusters(300, 0.3), clusters(90, 0.3, seed=1)
    assert linear_probe(*train, *val) == 1.0
    noise = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(2))
    assert linear_probe(*train, val[0], noise) < 0.6


def test_linear_probe_draws_nothing_and_does_not_mind_scales():
    train, val = clusters(200, 1.5), clusters(200, 1.5, seed=1)
    state = torch.get_rng_state()
    score = linear_probe(*train, *val)
    assert 0.4 < score < 1
    assert torch.equal(torch.get_rng_state(), state)
    scale, shift = torch.logspace(-3, 3, 8), torch.linspace(-50, 50, 8)
    moved = linear_probe(train[0] * scale + shift, train[1], val[0] * scale + shift, val[1])
    assert moved == pytest.approx(score, abs=0.02)
    with torch.no_grad():
        assert linear_probe(*train, *val) == score


def vit(**more):
    return ViT(**{"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, **more})


@pytest.mark.parametrize(
    ("targets", "depth"),
    [(["qk+vv"], 2), (["qk+vv:2"], 1), (["output"], 3), (["qk:3", "output:2"], 2), (["attn_post"], 2)],
)
def test_the_deepest_trained_block(targets, depth):
    student = vit()
    TinyMIM(student, vit(), targets=targets)
    assert trained_depth(student) == depth


def test_all_blocks_of_mae_are_trained_and_a_frozen_model_is_read_at_its_end():
    assert trained_depth(MAE(vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2).encoder) == 3
    assert trained_depth(vit().requires_grad_(False)) == 3


def test_embed_averages_patches_and_reads_nothing_untrained():
    student = vit().eval()
    TinyMIM(student, vit())
    images = torch.randn(5, 3, 32, 32)
    features = embed(student, images.split(2))
    maps = student.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(features, maps.mean((2, 3)).detach())
    torch.nn.init.constant_(student.blocks[2].mlp.fc2.weight, float("nan"))
    torch.testing.assert_close(embed(student, [images]), features)


@pytest.mark.parametrize("kind", ["two prefix tokens", "registers", "no class token"])
def test_every_block_is_embedded(kind):
    if kind == "two prefix tokens":
        model = vit(dist_token=True).eval()
    else:
        shape = dict(img_size=32, embed_dim=24, depth=3, num_heads=2)
        tokens = dict(reg_tokens=2) if kind == "registers" else dict(class_token=False, global_pool="avg")
        model = timm.create_model("vit_tiny_patch16_224", **shape, **tokens).eval()
    images = torch.randn(5, 3, 32, 32)
    found = embed_blocks(model, images.split(2))
    maps = model.forward_intermediates(images, return_prefix_tokens=kind != "no class token", intermediates_only=True)
    maps, prefix = zip(*maps, strict=True) if kind != "no class token" else (maps, None)
    torch.testing.assert_close(found["patches"], torch.stack([m.mean((2, 3)) for m in maps]).detach())
    assert ("class token" in found) == (prefix is not None)
    if prefix is not None:
        torch.testing.assert_close(found["class token"], torch.stack([p[:, 0] for p in prefix]).detach())
