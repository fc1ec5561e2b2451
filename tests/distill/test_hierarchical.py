"""Hiera and Swin distilled by attention: losses against a plain re-computation, what each reaches, bad input."""

import pytest
import timm
import torch

import tinymim
from tinymim.distill.hiera_mae import HieraDMAE
from tinymim.distill.simmim import D2SimMIM
from tinymim.errors import ConfigError
from tinymim.models import swin

SWIN = "swin_tiny_patch4_window7_224"
SMALL = dict(decoder=dict(dim=16, depth=1, heads=2))
STUDENTS = {
    "hiera_tiny_224": (dict(embed_dim=16, stages=(1, 2, 2, 1)), dict(embed_dim=24, stages=(1, 1, 3, 2), num_heads=2)),
    SWIN: (
        dict(embed_dim=12, depths=(1, 2, 2, 2), num_heads=(1, 2, 2, 4)),
        dict(embed_dim=24, depths=(1, 2, 1, 2), num_heads=(1, 2, 2, 3)),
    ),
}


def model(name, side=0, size=(96, 64), **more):
    torch.manual_seed(side)
    return tinymim.create_model(name, img_size=size, **{**STUDENTS[name][side], **more})


def images(count=2, size=(96, 64)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def orders(count=2, units=6):
    return torch.stack([torch.randperm(units, generator=torch.Generator().manual_seed(i)) for i in range(count)])


def method(name, student=None, teacher=None, **options):
    if name.startswith("hiera"):
        return HieraDMAE(student or model(name), teacher or model(name, 1), **SMALL, **options)
    return D2SimMIM(student or model(name), teacher or model(name, 1), **options)


def scores(q, k):
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def test_hiera_compares_the_last_blocks_of_the_same_units():
    """Logits of all visible tokens, 8 heads each, mapped; the teacher sees the same units, normalised for it."""
    found = method("hiera_tiny_224", mask_ratio=0.4, normalisation=((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))).eval()
    assert found.pairs == [(6, 7)]
    assert tuple(found.head_maps[0].weight.shape) == (16, 8, 1, 1)
    assert found.head_maps[0].bias is None
    pixels, order = torch.rand(2, 3, 96, 64), orders()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mean_t, std_t = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, order[:, :3], True)
    seen = []
    for side, shown in enumerate(((pixels - mean) / std, (pixels - mean_t) / std_t)):
        arguments = STUDENTS["hiera_tiny_224"][side]
        plain = timm.create_model("hiera_tiny_224", num_classes=0, img_size=(96, 64), q_pool=2, **arguments).eval()
        plain.load_state_dict((found.teacher if side else found.student).state_dict(), strict=False)
        attn = plain.blocks[-1].attn
        attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            plain.forward_features(shown, mask=mask)
        qkv = seen[-1].unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        # tokens lie as timm unrolls them, units innermost and in rising order: ours are in the order of the draw
        rank = order[:, :3].argsort(1).argsort(1)
        index = (torch.arange(4)[:, None] * 3 + rank[:, None, :]).flatten(1)[:, None, :, None]
        seen[-1] = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in qkv[:2]]
    with torch.no_grad():
        losses = found.losses((pixels - mean) / std, order)
        own, taught = (scores(*pair) for pair in seen)
        wanted = (found.head_maps[0](own) - taught).square().mean()
    torch.testing.assert_close(losses["attention"], wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"], losses["pixel"] + losses["attention"])
    torch.testing.assert_close(losses["pixel"], found.mae.losses((pixels - mean) / std, order)["pixel"])


@pytest.mark.parametrize("masked", [True, False])
def test_swin_compares_one_more_block(masked):
    """Its queries and keys come from the encoder's own output; the teacher sees the mask if it has a token for it."""
    student, teacher = model(SWIN), model(SWIN, 1)
    if masked:
        teacher.register_parameter("mask_token", torch.nn.Parameter(torch.randn(1, 1, 24)))
    found = method(SWIN, student, teacher).eval()
    assert found.pairs == [(8, 6)]
    x, order = images(), orders()
    hidden = found.mim.masked(order, (3, 2))
    assert hidden.sum((1, 2)).tolist() == [4, 4]
    outputs = []
    with torch.no_grad():
        for side, each in enumerate((student, teacher)):
            plain = timm.create_model(SWIN, num_classes=0, img_size=(96, 64), **STUDENTS[SWIN][side]).eval()
            plain.load_state_dict(each.state_dict(), strict=False)
            tokens = plain.patch_embed(x)
            if side == 0 or masked:
                here = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
                tokens[here] = each.mask_token[0, 0]
            attn = plain.layers[-1].blocks[-1].attn
            attn.qkv.register_forward_hook(lambda _, __, out: outputs.append(out))
            tokens = plain.layers(tokens)
            if side == 0:
                inner = found.extra.qk(found.extra.norm(tokens)).flatten(1, 2)  # one window of 3 x 2 cells
                q, k = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in inner.chunk(2, -1))
                table = found.extra.relative_position_bias_table[found.extra.index_NN]
                own = scores(q, k) + table.permute(2, 0, 1)
            else:
                q, k, _ = (p.unflatten(2, (3, -1)).transpose(1, 2) for p in outputs[-1].chunk(3, -1))
                taught = scores(q, k) + attn._get_rel_pos_bias()
        losses = found.losses(x, order)
        wanted = (found.head_maps[0](own) - taught).square().mean()
    torch.testing.assert_close(losses["attention"], wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(losses["loss"], losses["pixel"] + losses["attention"])


def test_swin_decouples_pixels_from_attention():
    """Pixels reach what comes before stage 3's blocks, attention the whole encoder."""
    found = method(SWIN)
    losses = found.losses(images(), orders())
    named = dict(found.student.named_parameters())
    pixel, attention = (
        torch.autograd.grad(losses[name], [*named.values()], retain_graph=True, allow_unused=True)
        for name in ("pixel", "attention")
    )
    for name, p, a in zip(named, pixel, attention, strict=True):
        assert (p is not None) == (not name.startswith(("layers.2.blocks", "layers.3"))), name
        assert a is not None, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hiera_tiny_224", {}),
        ("hiera_tiny_224", dict(student_blocks=[2, 6, 4], teacher_blocks=[2, 6, 3], q_pool=3)),
        ("hiera_tiny_224", dict(student_blocks=[1], teacher_blocks=[1])),
        (SWIN, {}),
        (SWIN, dict(student_blocks=[8, 3], teacher_blocks=[6, 3])),
        (SWIN, dict(student_blocks=[4], teacher_blocks=[4])),
        (SWIN, dict(student_blocks=[3], teacher_blocks=[3], decode_stage=1)),
        (SWIN, dict(student_blocks=[3], teacher_blocks=[3], decode_stage=4)),
    ],
)
def test_what_is_trained_gets_a_gradient(name, options):
    """DistributedDataParallel waits for all of them; the teacher and what nothing reads get none."""
    found = method(name, **options).train()
    found.losses(images(), orders())["loss"].backward()
    assert not [key for key, p in found.named_parameters() if p.requires_grad and p.grad is None]
    assert not [key for key, p in found.teacher.named_parameters() if p.requires_grad]
    assert not found.teacher.training
    assert not [key for key in found.learned.state_dict() if key.startswith("teacher")]
    kept = {key for key, p in found.student.named_parameters() if not p.requires_grad}
    assert not kept or "student_blocks" in options


@pytest.mark.parametrize("name", STUDENTS)
def test_a_map_that_copies_heads_changes_nothing(name):
    alike = [model(name), model(name)]
    mapped, plain = method(name, *alike), method(name, *alike, head_map=False)
    if name == SWIN:
        plain.extra.load_state_dict(mapped.extra.state_dict())
        plain.mim.load_state_dict(mapped.mim.state_dict())
    heads = mapped.head_maps[0].in_channels
    mapped.head_maps[0].weight.data.copy_(torch.eye(heads)[:, :, None, None])
    a, b = (each.eval().losses(images(), orders())["attention"] for each in (mapped, plain))
    torch.testing.assert_close(a, b)
    if name != SWIN:  # student and teacher are one model
        assert float(a) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: method("hiera_tiny_224", student_blocks=[7], teacher_blocks=[7]),
            "block 7 does not exist in the stud",
        ),
        (lambda: method("hiera_tiny_224", teacher_blocks=[8]), "block 8 does not exist in the teacher"),
        (lambda: method("hiera_tiny_224", student_blocks=[6, 5]), "compared in pairs"),
        (lambda: method("hiera_tiny_224", student_blocks=[1]), "block 1 of the student cannot be compared"),
        (lambda: method("hiera_tiny_224", head_map=False), "head_map=False with 8 heads"),
        (lambda: method("hiera_tiny_224", student=model("hiera_tiny_224", size=(96, 80))), "96 x 80 pixels"),
        (lambda: method("hiera_tiny_224", teacher=model(SWIN, 1)), "the teacher is a swin_tiny"),
        (lambda: method("hiera_tiny_224", student=model(SWIN)), "the student is a swin_tiny"),
        (
            lambda: method("hiera_tiny_224", teacher=model("hiera_tiny_224", 1, mask_unit_size=(16, 16))),
            "mask units of 32 pixels .* 64",
        ),
        (lambda: method(SWIN, student_blocks=[9]), "block 9 does not exist in the student"),
        (lambda: method(SWIN, student_blocks=[4], teacher_blocks=[3]), "stride 16, windows"),
        (lambda: method(SWIN, student_blocks=[2], teacher_blocks=[3]), "shifted by"),
        (lambda: method(SWIN, teacher=model("hiera_tiny_224", 1)), "the teacher is a hiera_tiny"),
        (lambda: method(SWIN, teacher=tinymim.create_model("tinymim_vit_tiny", depth=1)), "the teacher is a ViT"),
        (lambda: method(SWIN, mask_patch=48), "mask_patch=48"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_further_block_has_the_windows_of_the_teachers():
    """At sizes where the last stage has several windows: those of block 6 are shifted."""
    found = method(SWIN, model(SWIN, size=(256, 256)), model(SWIN, 1, (256, 256)))
    assert (found.extra.window, found.extra.shift) == ((7, 7), (3, 3))
    assert swin.blocks_of(found.teacher)[5].shift_size == (3, 3)
    assert found.losses(images(1, (256, 256)), orders(1, 64))["loss"].isfinite()
    with pytest.raises(ConfigError, match="block 8 of the student is compared with 2 blocks"):
        method(SWIN, *(model(SWIN, i, (256, 256)) for i in (0, 1)), student_blocks=[8, 8], teacher_blocks=[5, 6])
