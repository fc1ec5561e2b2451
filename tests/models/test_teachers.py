"""timm teachers from files: real architectures, small and random; every tensor arrives, foreign files do not."""

import pytest
import timm
import torch

from tests.distill.test_taps import TEACHERS
from tinymim.cli import _listed
from tinymim.distill.taps import QKV, read
from tinymim.errors import CheckpointError
from tinymim.models import teachers
from tinymim.models.teachers import load_teacher


def source(name, monkeypatch, tmp_path):
    """A small model of a real architecture, its file, and timm made to build such small ones."""
    real, kwargs = timm.create_model, dict(TEACHERS[name])
    torch.manual_seed(1)
    model = real(name.split(".")[0], **kwargs).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    del kwargs["img_size"]
    monkeypatch.setattr(teachers.timm, "create_model", lambda n, **more: real(n, **{**more, **kwargs}))
    return model, tmp_path / "weights.pth", TEACHERS[name]["img_size"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_file_of_timms_weights(name, monkeypatch, tmp_path):
    """At its own size the same model to the last tensor; at another size its positions are resized."""
    model, file, side = source(name, monkeypatch, tmp_path)
    taught = load_teacher(f"timm/{name}", weights=file, img_size=side).model
    assert all(torch.equal(value, taught.state_dict()[key]) for key, value in model.state_dict().items())
    images = torch.randn(1, 3, side, side)
    for block, taps in read(model, images, {3: (*QKV, "output")}).items():
        for key, value in read(taught, images, {block: (*QKV, "output")})[block].items():
            torch.testing.assert_close(value, taps[key])
    larger = load_teacher(f"timm/{name}", weights=file, img_size=side * 3 // 2).model
    size = side * 3 // 2
    tokens = read(larger, torch.randn(1, 3, size, size), {3: ("output",)})[3]["output"]
    assert tokens.shape[1] == taps["output"].shape[1] + 20
    assert torch.isfinite(tokens).all()


def test_sam_that_is_downloaded_at_another_size(monkeypatch, tmp_path):
    """timm refuses it: the native model is loaded, its positions and relative tables are resized."""
    model, _, _ = source("samvit_base_patch16", monkeypatch, tmp_path)
    small = teachers.timm.create_model

    def create(name, pretrained=False, img_size=64, **kwargs):
        return model if pretrained else small(name, img_size=img_size, **kwargs)

    monkeypatch.setattr(teachers.timm, "create_model", create)
    taught = load_teacher("timm/samvit_base_patch16", img_size=96).model
    assert taught.pos_embed.shape == (1, 6, 6, 48)
    assert torch.equal(taught.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(taught.pos_embed.mean(), model.pos_embed.mean(), atol=0.02, rtol=0)
    assert read(taught, torch.randn(1, 3, 96, 96), {3: QKV})[3]["q"].shape == (1, 36, 48)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_clip_224"])
def test_a_file_that_a_plain_model_cannot_hold_is_refused(name, monkeypatch, tmp_path):
    """Once such a teacher was built with half of it random."""
    _, file, _ = source(name, monkeypatch, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_teacher(str(file), num_heads=4)
    assert "is not a plain vision transformer" in error.value.what or "distillation token" in error.value.what
    if "plain" in error.value.what:
        assert "--teacher timm/NAME --teacher-weights" in error.value.fix
    with pytest.raises(CheckpointError, match="does not fit timm's Beit"):
        load_teacher("timm/beit_base_patch16_224", weights=file, img_size=64)


def test_openais_clip_has_its_own_activation(capsys):
    """timm's plain entry is another function than the one that was trained; ours is not, and a wrong choice is said."""
    assert not [teacher.name for teacher in _listed.TEACHERS if "clip_2" in teacher.name]
    load_teacher("timm/vit_base_patch16_clip_224.openai", pretrained=False, img_size=32)
    assert "use quickgelu model variant" in capsys.readouterr().out


def test_a_teacher_from_outside_is_one_function(tmp_path):
    """A registered prefix, used like any other name: distilled from, in the records, with its own normalisation."""
    from tinymim.distill import TinyMIM
    from tinymim.distill.teachers import load_for_recipe, named_teachers
    from tinymim.engine import load_recipe
    from tinymim.models import ViT, create_model
    from tinymim.models.teachers import TEACHERS, Teacher, register_teacher

    @register_teacher("mine/")
    def load(name, *, img_size, **_):
        width = int(name.removeprefix("mine/"))
        model = ViT(img_size=img_size, embed_dim=width, depth=2, num_heads=2).eval().requires_grad_(False)
        return Teacher(model, name, (0.5,) * 3, (0.25,) * 3, None)

    try:
        student = create_model("tinymim_vit_tiny", img_size=32, depth=1, embed_dim=24, num_heads=2)
        recipe = load_recipe("tinymim_tiny_from_mae_base", {"teacher": "mine/48", "img_size": 32})
        method = TinyMIM.from_recipe(recipe, student)
        assert method.normalisations[1] == ((0.5,) * 3, (0.25,) * 3)
        assert len(method.teachers[0].sha256) == 64
        x = torch.randn(2, 3, 32, 32)
        assert set(method.losses(x, x)) == {"qk", "vv", "loss"}
        assert named_teachers(["mine/48", "mine/64=0.5"], None)["teachers"][1] == {"teacher": "mine/64", "weight": 0.5}
        assert load_for_recipe(recipe, {**recipe, "teacher": "mine/64"}, student, pretrained=True).block == 2
    finally:
        TEACHERS.pop("mine/")
