"""Frozen ViTs with 8-bit products: near the float network, exact where the numbers allow it, refused where unfit."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.attack.kills import write_data
from tinymim.distill.int8_frozen import Int8Linear, can_int8, fits, quantise_blocks
from tinymim.distill.relations import relation_kl, relation_logits
from tinymim.distill.sources import LiveTeacher
from tinymim.engine import distill, pretrain
from tinymim.engine.loop import StepLoop
from tinymim.errors import ConfigError
from tinymim.models import ViT

SMALL = dict(img_size=64, embed_dim=64, depth=4, num_heads=4)
GRID, WANTED = (4, 4), {4: ("q", "k", "v")}
needs_int8 = pytest.mark.skipif(not can_int8(), reason="this processor has no AVX512-VNNI")


def teachers():
    torch.manual_seed(0)
    for model in (ViT(**SMALL), timm.create_model("vit_small_patch16_224", **SMALL)):
        for block in model.blocks:  # gains and outliers as trained networks have them
            for norm in (block.norm1, block.norm2):
                norm.weight.data.uniform_(0.2, 2.0)
                norm.weight.data[3] = 8.0
                norm.bias.data.normal_(0, 0.3)
        yield model.eval()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relations_of_an_8_bit_teacher(dtype):
    """They are nearer to the float teacher's than 0.01 nats; a teacher of other weights is a hundred times as far."""
    for model in teachers():
        images = torch.randn(24, 3, 64, 64)
        plain, teacher = LiveTeacher(copy.deepcopy(model)), LiveTeacher(model)
        teacher.calibrate(images[:16], WANTED, GRID, dtype)
        teacher.prepare(dtype)
        assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 9  # three layers of each block before the 4th
        found, want = (source.read(images[16:], WANTED, GRID)[4] for source in (teacher, plain))
        other = LiveTeacher(ViT(**SMALL)).read(images[16:], WANTED, GRID)[4]

        def divergence(q, want=want):
            return sum(
                float(relation_kl(relation_logits(q[a].float(), q[b].float(), 4), relation_logits(want[a], want[b], 4)))
                for a, b in ("qk", "vv")
            )

        assert divergence(found) < 0.01 < 0.1 * divergence(other)


@needs_int8
def test_what_8_bits_hold_is_exact():
    """Whole numbers in the range come out as from the float layer, GELU included; others are clipped and rounded."""
    layer = nn.Linear(32, 8).requires_grad_(False)
    layer.weight.copy_(torch.randint(-127, 128, (8, 32)).float())
    layer.weight[:, 0] = 127.0
    x = torch.randint(-100, 155, (5, 32)).float()
    for gelu in (False, True):
        want = nn.functional.gelu(layer(x)) if gelu else layer(x)
        eight = Int8Linear(layer, torch.float32, (1.0, 100), gelu=gelu)
        torch.testing.assert_close(eight(x + 100.5), want, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(eight((x + 100).to(torch.uint8)), want, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(eight(torch.full((1, 32), 1e6)), eight(torch.full((1, 32), 255.0)))
    torch.testing.assert_close(eight(torch.full((1, 32), -1e6)), eight(torch.full((1, 32), 0.0)))


@needs_int8
def test_an_image_does_not_change_another():
    """Scales are fixed: any size of a pass gives the same targets."""
    model = next(teachers())
    images = torch.randn(8, 3, 64, 64)
    teacher = LiveTeacher(model)
    teacher.calibrate(images, WANTED, GRID, torch.float32)
    teacher.prepare(torch.float32)
    whole, alone = teacher.read(images, WANTED, GRID)[4], teacher.read(images[2:3], WANTED, GRID)[4]
    for name in "qkv":
        torch.testing.assert_close(whole[name][2:3], alone[name], rtol=1e-5, atol=1e-5)


def test_teachers_that_do_not_fit():
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4)
    assert not any(map(fits, beit.blocks))
    message = "none of its blocks before block 2" if can_int8() else "AVX512-VNNI"
    with pytest.raises(ConfigError, match=message):
        quantise_blocks(beit, lambda: None, [2], torch.float32)
    with pytest.raises(ConfigError, match="none of its blocks before block 1" if can_int8() else "AVX512-VNNI"):
        quantise_blocks(ViT(**SMALL), lambda: None, [1], torch.float32)


@needs_int8
def test_a_run(tmp_path, monkeypatch):
    """``teacher_precision=int8``: near the losses without it; a run that was stopped goes on as if it had not been."""
    write_data(tmp_path)
    sizes = {"student_args": dict(depth=2, embed_dim=24, num_heads=2)}
    common = dict(data=tmp_path / "photos/train", img_size=32, batch_size=4, max_steps=4, save_every=2, workers=0)
    teacher = pretrain(
        "mae_tiny", **common, out=tmp_path / "t", cfg_options=sizes | {"decoder": dict(dim=16, depth=1, heads=2)}
    )

    def run(name, precision="int8"):
        return distill(
            **common,
            teacher=str(teacher.student),
            out=tmp_path / name,
            resume=(tmp_path / name).exists(),
            cfg_options=sizes | {"teacher_precision": precision, "precision": "fp32"},
        )

    whole, plain = run("whole"), run("plain", "auto")
    assert whole.losses["loss"] == pytest.approx(plain.losses["loss"], rel=0.05)
    assert whole.losses["loss"] != plain.losses["loss"]
    go, steps = StepLoop.run_iter, []

    def stop(self, batch):
        steps.append(batch)
        if len(steps) > 2:
            raise RuntimeError("stopped")
        return go(self, batch)

    monkeypatch.setattr(StepLoop, "run_iter", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run("stopped")
    monkeypatch.undo()
    assert run("stopped").student.read_bytes() == whole.student.read_bytes()
