"""Relation losses and taps: log space, any head grouping, timm teachers, frozen and unused parts."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.distill import TinyMIM, qkv_at, relation_kl, relation_logits, relation_losses
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import ViT
from tinymim.models.teachers import load_teacher


@settings(max_examples=30, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 9), scale=st.floats(0.1, 100))
def test_relation_kl_is_a_divergence(heads, tokens, scale):
    """Never negative, zero for equal relations, finite for sharp ones, equal to the direct formula."""
    torch.manual_seed(tokens)
    a, b, c, d = (torch.randn(2, tokens, 8, dtype=torch.float64) * scale for _ in range(4))
    s, t = relation_logits(a, b, heads).double(), relation_logits(c, d, heads).double()
    loss = relation_kl(s, t)
    assert torch.isfinite(loss)
    assert loss >= -1e-12
    assert relation_kl(t, t).abs() < 1e-12
    if scale < 3:
        p, q = t.softmax(-1), s.softmax(-1)
        torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean(), rtol=1e-6, atol=1e-9)


def test_sharp_relations_have_finite_gradients():
    """Where probabilities underflow, log space keeps loss and gradient finite."""
    q = torch.full((1, 3, 4), 100.0).requires_grad_()
    k = torch.randn(1, 3, 4) * 100
    losses = relation_losses({"q": q, "k": k, "v": k}, {"q": -q.detach(), "k": k, "v": -k}, 2)
    (losses["qk"] + losses["vv"]).backward()
    assert torch.isfinite(q.grad).all()


def pair():
    student = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2, rel_pos_bias=True, init_values=0.1)
    return student, ViT(img_size=64, embed_dim=32, depth=3, num_heads=4)


def test_unused_parts_need_no_gradient():
    """After a step every parameter that requires a gradient has one: DDP needs no unused-parameter search."""
    student, teacher = pair()
    method = TinyMIM(student, teacher).train()
    assert not teacher.training
    images = torch.randn(2, 3, 64, 64)
    method.losses(images, images)["loss"].backward()
    for name, p in student.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_stops_inside_its_block():
    """Breaking what lies behind the target block's q, k, v changes nothing."""
    _, teacher = pair()
    images = torch.randn(1, 3, 64, 64)
    before = qkv_at(teacher, images, 2)
    del teacher.blocks[2:]
    teacher.blocks[1].mlp = teacher.blocks[1].attn.proj = None
    after = qkv_at(teacher, images, 2)
    assert all(torch.equal(before[k], after[k]) for k in "qkv")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224"])
def test_timm_taps_equal_hooks(name):
    """q, k, v of timm models equal what a hook on the real forward pass sees."""
    torch.manual_seed(0)
    args = dict(embed_dim=48, num_heads=4, depth=3, num_classes=0, img_size=64)
    model = timm.create_model(name, **args).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    images = torch.randn(2, 3, 64, 64)
    seen = []
    model.blocks[1].norm1.register_forward_hook(lambda m, i, o: seen.append(o))
    model.forward_features(images)
    attn = model.blocks[1].attn
    bias = attn.qkv.bias if attn.qkv.bias is not None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    expected = torch.nn.functional.linear(seen[0], attn.qkv.weight, bias).chunk(3, -1)
    for key, value in zip("qkv", expected, strict=True):
        torch.testing.assert_close(qkv_at(model, images, 2)[key], value)
    student = ViT(img_size=64, embed_dim=24, depth=2, num_heads=2)
    assert torch.isfinite(TinyMIM(student, model).losses(images, images)["loss"])


def test_default_target_block():
    student = ViT(img_size=32, embed_dim=24, depth=2, num_heads=2)
    deep = ViT(img_size=32, embed_dim=24, depth=24, num_heads=2)
    assert TinyMIM(student, deep).target_block == 18
    assert TinyMIM(student, ViT(img_size=32, embed_dim=24, depth=12, num_heads=2)).target_block == 12


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        (dict(patch_size=8), {}, "patch size"),
        (dict(num_heads=4, embed_dim=32), dict(relation_heads=16), "do not divide"),
        ({}, dict(target_block=4), "has 3 blocks"),
    ],
)
def test_pairs_that_do_not_fit(teacher, more, words):
    student, _ = pair()
    with pytest.raises(ConfigError, match=words):
        TinyMIM(student, ViT(**(dict(img_size=64, embed_dim=24, depth=3, num_heads=2) | teacher)), **more)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match="the teacher is a Linear"):
        TinyMIM(pair()[0], torch.nn.Linear(2, 2))


def test_timm_teacher_from_a_file_and_offline(tmp_path, monkeypatch):
    """Weights from a file load into timm's model; without network the error names file, address and option."""
    name = "timm/vit_tiny_patch16_224.augreg_in21k"
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"model": source.state_dict()}, tmp_path / "t.pth")
    teacher = load_teacher(name, weights=tmp_path / "t.pth", img_size=64)
    assert torch.equal(teacher.model.cls_token, source.cls_token)
    assert teacher.mean == (0.5, 0.5, 0.5)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(CheckpointError, match="--teacher-weights"):
        load_teacher(name)
