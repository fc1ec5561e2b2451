"""Every target and loss of the paper's study: words, formulas, gradients, masks, grids."""

from dataclasses import astuple

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.distill import TinyMIM, class_token_kl, feature_loss, parse_target, read, whiten
from tinymim.errors import ConfigError
from tinymim.models import ViT
from tinymim.models.teachers import load_teacher

WORDS = ["qk+vv", "qq+kk+vv", "qk", "output", "attn_pre", "attn_post", "ffn_pre", "ffn_post", "qkv", "class_token"]


def pair(student_width=24, teacher_width=32, **student):
    torch.manual_seed(0)
    made = (
        ViT(img_size=64, embed_dim=student_width, depth=3, num_heads=2, rel_pos_bias=True, init_values=0.5, **student),
        ViT(img_size=64, embed_dim=teacher_width, depth=4, num_heads=4),
    )
    for model in made:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return made


def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64)


# words ------------------------------------------------------------------------------------------------------------


def test_words():
    target = parse_target("qk+vv@18:6=0.5", 24, 12)
    assert (target.kind, target.parts, target.teacher_block, target.student_block, target.weight) == (
        "relation",
        ("qk", "vv"),
        18,
        6,
        0.5,
    )
    assert target.taps == ("q", "k", "v")
    assert parse_target("vv", 24, 12).taps == ("v",)
    assert parse_target("vv", 24, 12).teacher_block == 18
    assert parse_target("vv", 12, 12).teacher_block == 12
    assert parse_target("vv", 24, 12, teacher_block=21).teacher_block == 21
    assert parse_target("ffn_post", 12, 12) == parse_target("output", 12, 12)
    assert parse_target("qkv:3", 12, 12).parts == ("q", "k", "v")
    assert parse_target("class_token", 12, 12).taps == ("output",)


@pytest.mark.parametrize(
    "word", ["", "qx", "qk+", "QK", "features", "qk@", "qk@0", "qk@25", "qk:13", "qk=", "qk=1.2.3", "qk=.", "output+vv"]
)
def test_other_words_are_refused(word):
    with pytest.raises(ConfigError):
        parse_target(word, 24, 12)


# formulas ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 50))
def test_formulas(seed, scale):
    """Equations 6 to 8 by hand."""
    torch.manual_seed(seed)
    s, t = torch.randn(2, 3, 8).double() * scale, torch.randn(2, 3, 8).double() * scale
    mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(whiten(t), (t - mean) / (var + 1e-5).sqrt())
    e = (s - whiten(t)).abs()
    by_hand = torch.where(e <= 2, 0.5 * e**2 / 2, e - 1).mean()
    torch.testing.assert_close(feature_loss(s, t).double(), by_hand, rtol=1e-4, atol=1e-6)
    loss = class_token_kl(s[:, 0], t[:, 0])
    assert loss >= -1e-6
    assert class_token_kl(t[:, 0], t[:, 0]).abs() < 1e-6
    if scale < 3:
        p, q = t[:, 0].softmax(-1), s[:, 0].softmax(-1)
        torch.testing.assert_close(loss.double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-5)


def test_losses_by_hand():
    """What the method returns is the formula on what the taps give."""
    student, teacher = pair()
    method = TinyMIM(student, teacher, targets=("qkv@2:3", "class_token@4:2=0.25", "attn_post@3:1"))
    x = images()
    losses = method.losses(x, x)
    t, s = (
        read(m, x, {b: ("q", "k", "v", "attn_post", "output") for b in range(1, 5 - (m is student))})
        for m in (teacher, student)
    )
    for part in "qkv":
        expected = F.smooth_l1_loss(method.maps[f"0_{part}"](s[3][part]), whiten(t[2][part]), beta=2.0)
        torch.testing.assert_close(losses[part], expected)
    mapped = method.maps["1_class_token"](s[2]["output"][:, 0])
    torch.testing.assert_close(losses["class_token"], class_token_kl(mapped, t[4]["output"][:, 0]))
    total = sum(losses[part] for part in "qkv") + 0.25 * losses["class_token"] + losses["attn_post"]
    torch.testing.assert_close(losses["loss"], total)


def test_scores_without_softmax():
    student, teacher = pair(32, 32)
    method = TinyMIM(student, teacher, softmax=False, relation_heads=8)
    x = images()
    losses = method.losses(x, x)
    s, t = (read(m, x, {b: ("q", "k", "v")})[b] for m, b in ((student, 3), (teacher, 4)))
    scores = [
        (m["q"].reshape(2, 17, 8, 4).transpose(1, 2) / 2) @ m["k"].reshape(2, 17, 8, 4).permute(0, 2, 3, 1)
        for m in (s, t)
    ]
    torch.testing.assert_close(losses["qk"], F.smooth_l1_loss(*scores, beta=2.0))
    assert set(losses) == {"qk", "vv", "loss"}


def test_several_pairs_keep_their_names():
    student, teacher = pair()
    x = images()
    losses = TinyMIM(student, teacher, targets=("qk+vv@4:3", "qk@2:1")).losses(x, x)
    assert set(losses) == {"qk@4:3", "qk@2:1", "vv", "loss"}
    torch.testing.assert_close(losses["loss"], losses["qk@4:3"] + losses["vv"] + losses["qk@2:1"])


# gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": "student"},
        {"mask": "student", "reconstruct": dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)},
    ],
    ids=["raw", "masked", "reconstructed"],
)
@pytest.mark.parametrize("word", [*WORDS, "output:2", "attn_pre:2", "qk:2"])
def test_exactly_what_is_reached_needs_a_gradient(word, more):
    """DDP needs no search for unused parameters, and nothing that learns is frozen."""
    if more:
        torch.manual_seed(0)
        student = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2, init_values=0.5)
        teacher = pair()[1]
    else:
        student, teacher = pair()
    method = TinyMIM(student, teacher, targets=(word,), **more).train()
    assert not teacher.training
    x = images()
    losses = method.losses(x, x)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert ("pixel" in losses) == ("reconstruct" in more)
    names = {p: n for n, p in method.named_parameters()}
    for p in method.parameters():
        assert (p.grad is not None) == p.requires_grad, names[p]
    saved = sum(t.numel() for t in method.learned.state_dict().values())
    own = {id(t): t.numel() for n, t in method.state_dict(keep_vars=True).items() if not n.startswith("teacher.")}
    assert saved == sum(own.values())  # everything that learns, once


def test_equal_networks_have_no_loss():
    """The student in the teacher's place: every divergence is zero, whatever the mask."""
    torch.manual_seed(0)
    teacher = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2)
    student = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2)
    student.load_state_dict(teacher.state_dict())
    x = images()
    for mask in (None, "both"):
        losses = TinyMIM(student, teacher, targets=("qk+vv+qq", "class_token"), mask=mask).losses(x, x)
        assert float(losses["loss"].detach()) < 1e-6, mask
    for mask in ("student", "teacher"):
        assert TinyMIM(student, teacher, mask=mask).losses(x, x)["loss"] > 1e-6


def test_masked_sides_see_the_same_patches():
    """A masked student against a whole teacher: relations among the tokens both have."""
    student, teacher = pair()
    student = ViT(img_size=64, embed_dim=24, depth=3, num_heads=2)
    method = TinyMIM(student, teacher, mask="student", mask_ratio=0.5, relation_heads=4)
    x = images()
    torch.manual_seed(3)
    loss = method.losses(x, x)["vv"]
    torch.manual_seed(3)
    keep = torch.rand(2, 16).argsort(1)[:, :8]
    s = read(student, x, {3: ("v",)}, keep)[3]["v"]
    t = read(teacher, x, {4: ("v",)})[4]["v"]
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), keep + 1], 1)
    t = t.gather(1, rows[..., None].expand(-1, -1, 32))
    s, t = (m.reshape(2, 9, 4, -1).transpose(1, 2) for m in (s, t))
    s, t = (((m / m.shape[-1] ** 0.5) @ m.transpose(2, 3)).log_softmax(-1) for m in (s, t))
    torch.testing.assert_close(loss, (t.exp() * (t - s)).sum(-1).mean())


def test_teacher_drop_path():
    student, teacher = pair()
    method = TinyMIM(student, teacher, targets=("output",), teacher_drop_path=0.5).train()
    x, seen = images(), set()
    for seed in range(4):
        torch.manual_seed(seed)
        seen.add(round(float(method.losses(x, x)["loss"].detach()), 6))
    assert len(seen) > 1
    method.eval()
    assert len({float(method.losses(x, x)["loss"].detach()) for _ in range(3)}) == 1
    assert not teacher.training


# tokens and grids -------------------------------------------------------------------------------------------------


def test_class_token_in_and_out():
    student, teacher = pair()
    x = images()
    inside, outside = (TinyMIM(student, teacher, class_token=c).losses(x, x)["vv"] for c in (None, False))
    v = [read(m, x, {b: ("v",)})[b]["v"] for m, b in ((student, 3), (teacher, 4))]
    for tokens, loss in ((v, inside), ([m[:, 1:] for m in v], outside)):
        s, t = (m.reshape(2, m.shape[1], 4, -1).transpose(1, 2) for m in tokens)
        s, t = (((m / m.shape[-1] ** 0.5) @ m.transpose(2, 3)).log_softmax(-1) for m in (s, t))
        torch.testing.assert_close(loss, (t.exp() * (t - s)).sum(-1).mean())


SMALL = dict(embed_dim=48, num_heads=4, depth=3, num_classes=0)
OTHERS = {
    "vit_small_patch14_reg4_dinov2": ("image", True),
    "eva02_tiny_patch14_224": ("tokens", True),
    "vit_small_patch16_dinov3": (None, True),
    "vit_base_patch16_siglip_224": (None, False),
    "samvit_base_patch16": (None, False),
    "beitv2_base_patch16_224": (None, True),
    "vit_base_patch16_clip_224": (None, True),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("word", ["qk+vv", "output"])
def test_teachers_beyond_mae(name, word):
    """Registers are dropped, a class token counts where both have one, grids are brought together as chosen."""
    align, token = OTHERS[name]
    torch.manual_seed(0)
    patch = 14 if "14" in name else 16
    side = 4 * patch if align != "tokens" else 6 * patch
    more = dict(global_attn_indexes=(2,)) if "sam" in name else {}
    teacher = timm.create_model(name, **SMALL, img_size=side, **more).eval()
    student = ViT(img_size=64, embed_dim=24, depth=2, num_heads=2, dist_token=True)
    method = TinyMIM(student, teacher, targets=(word,), align=align)
    assert method.class_token == token
    own = images()
    theirs = F.interpolate(own, size=(side, side)) if align == "tokens" else own
    losses = method.losses(own, theirs)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    if align == "image":
        resized = F.interpolate(own, size=(56, 56), mode="bicubic", antialias=True)
        same = TinyMIM(student, teacher, targets=(word,), align="image")
        same.load_state_dict(method.state_dict())
        torch.testing.assert_close(same.losses(own, resized)["loss"], losses["loss"], rtol=1e-3, atol=1e-4)


def test_resampled_tokens_of_a_smooth_teacher():
    """Tokens that change evenly over the image keep doing so on the other grid."""
    from tinymim.models.tokens import resample

    ramp = torch.linspace(0, 1, 6).expand(6, 6).reshape(1, 36, 1)
    out = resample(torch.cat([torch.full((1, 1, 1), 9.0), ramp], 1), 1, (3, 3))
    assert out.shape == (1, 10, 1)
    assert out[0, 0] == 9
    rows = out[0, 1:, 0].reshape(3, 3)
    torch.testing.assert_close(rows[0], rows[2])
    assert (rows[:, 0] < rows[:, 2]).all()
    torch.testing.assert_close(rows[:, 1], torch.full((3,), 0.5))


def test_tokens_of_a_size_that_is_no_whole_number_of_patches():
    """96 pixels are 6.9 patches of 14: the teacher sees all of them (once the right and bottom 12 were cut off)."""
    torch.manual_seed(0)
    teacher = load_small("vit_small_patch14_reg4_dinov2", 96)
    assert teacher.patch_embed.img_size == (98, 98)
    method = TinyMIM(ViT(img_size=96, embed_dim=24, depth=2, num_heads=2), teacher, align="tokens").eval()
    own = torch.randn(2, 3, 96, 96)
    changed = own.clone()
    changed[..., 86:] = 3.0
    with torch.no_grad():
        losses = [method.losses(own, view)["loss"].item() for view in (own, changed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def load_small(name, img_size):
    """A timm teacher as a run builds it, small."""
    real = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda n, **more: real(n, **{**more, **SMALL}))
        return load_teacher(f"timm/{name}", pretrained=False, img_size=img_size).model


def test_suggested_teachers_are_what_timm_has(capsys):
    from tinymim.cli import main
    from tinymim.cli._listed import TEACHERS
    from tinymim.models.teachers import describe_teacher

    assert main(["list", "teachers"]) == 0
    told = capsys.readouterr().out
    for listed in TEACHERS:
        assert f"timm/{listed.name}" in told
        assert astuple(describe_teacher(listed.name)) == (f"timm/{listed.name}", *listed[1:])
    for name in ("resnet18", "no_such_model"):
        with pytest.raises(ConfigError):
            describe_teacher(name)


def test_a_timm_teacher_of_a_grid(tmp_path):
    teacher = load_teacher("timm/vit_small_patch14_dinov2", pretrained=False, grid=4)
    assert teacher.model.patch_embed.img_size == (56, 56)


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        ("vit_small_patch14_dinov2", {}, "align='image'"),
        ("vit_base_patch16_siglip_224", dict(class_token=True), "the teacher has no class token"),
        ("vit_base_patch16_siglip_224", dict(targets=("class_token",)), "the teacher has no class token"),
        (None, dict(targets=()), "no targets"),
        (None, dict(mask="all"), "mask='all' is unknown"),
        (None, dict(align="crop"), "align='crop' is unknown"),
        (None, dict(mask="student", mask_ratio=1.0), "must be between 0 and 1"),
        (None, dict(reconstruct={}), "needs a masked student"),
        (None, dict(mask="both", align="tokens"), "masked teacher"),
        (None, dict(teacher_drop_path=1.0), "must be from 0 to below 1"),
        (None, dict(relation_heads=5), "do not divide"),
        ("100", {}, "pads such photos"),
        ("dist", dict(mask="student", reconstruct={}), "needs a class token as the only prefix token"),
    ],
)
def test_what_does_not_fit(teacher, options, words):
    student, ours = pair()
    side = 56 if teacher and "14" in teacher else 64
    if teacher in ("100", "dist"):
        student = ViT(
            img_size=100 if teacher == "100" else 64, embed_dim=24, depth=2, num_heads=2, dist_token=teacher == "dist"
        )
        teacher = "vit_base_patch16_224"
    made = ours if teacher is None else timm.create_model(teacher, **SMALL, img_size=side)
    with pytest.raises(ConfigError) as error:
        TinyMIM(student, made, **options)
    assert words in str(error.value) + error.value.fix
