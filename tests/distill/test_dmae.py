"""D-MAE and D2-MAE: the published numbers, unequal models, what each loss reaches, bad input."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tinymim
from tinymim.distill import D2MAE, DMAE, read, relation_logits
from tinymim.engine import distill
from tinymim.errors import ConfigError
from tinymim.models import ViT, create_model, save_student
from tinymim.models.mae import MAE

SMALL = dict(decoder=dict(dim=16, depth=1, heads=2))


def vit(embed_dim=24, depth=3, num_heads=2, **more):
    return ViT(img_size=64, embed_dim=embed_dim, depth=depth, num_heads=num_heads, **more)


def images(count=2, side=64):
    return torch.from_numpy(np.random.RandomState(3).standard_normal((count, 3, side, side)).astype("float32"))


def orders(count=2, patches=16):
    return torch.stack([torch.randperm(patches, generator=torch.Generator().manual_seed(i)) for i in range(count)])


def test_published_numbers(golden):
    """Both losses and all gradients of the published implementation."""
    numbers, _ = golden("mae_lite_distill")
    sides = {}
    for side in ("student", "teacher"):
        sides[side] = vit(**{key: numbers[side][key] for key in ("embed_dim", "depth", "num_heads")})
        tinymim.load_weights(sides[side], {"model": golden.state(f"{side}/", numbers[f"{side}_shapes"])})
    method = DMAE(**sides, student_blocks=numbers["distilled_blocks"], **SMALL).eval()
    own = golden.state("student/", numbers["student_shapes"])
    method.mae.load_state_dict({k: v for k, v in own.items() if "decoder" in k or k == "mask_token"}, strict=False)
    shape = {"adapter.weight": tuple(method.head_maps[0].weight.shape)}
    method.head_maps[0].weight.data.copy_(golden.state("", shape)["adapter.weight"])
    draw = np.random.RandomState(numbers["input_seed"]).standard_normal((2, 3, 64, 64))
    losses = method.losses(torch.from_numpy(draw.astype("float32")), torch.tensor(numbers["ids_shuffle"]))
    assert losses["pixel"].item() == pytest.approx(numbers["mae_loss"], rel=1e-5)
    assert losses["attention"].item() == pytest.approx(numbers["attention_logit_mse"], rel=1e-5)
    losses["loss"].backward()
    parameters = {name.removeprefix("encoder."): p for name, p in method.mae.named_parameters()}
    for name, (norm, first) in numbers["grad_norm_and_first"].items():
        assert float(parameters[name].grad.norm()) == pytest.approx(norm, rel=1e-5), name
        assert float(parameters[name].grad.flatten()[0]) == pytest.approx(first, rel=1e-4, abs=1e-7), name
    assert float(method.head_maps[0].weight.grad.norm()) == pytest.approx(numbers["adapter_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_without_a_map_of_heads_no_logits_are_stored_and_the_loss_is_the_same(precision):
    """Of every pair of blocks, of models of unequal depth and width; and its gradient."""
    student, teacher = vit(num_heads=4).to(precision), vit(32, 5, 4).to(precision)
    method = DMAE(student, teacher, student_blocks=[3, 1], teacher_blocks=[4, 2], head_map=False, **SMALL)
    method.to(precision)
    x, order = images().to(precision), orders()
    losses = method.losses(x, order)
    assert not method.head_maps
    keep = order[:, :4]
    s, t = (read(m, x, {b: ("q", "k") for b in bs}, keep) for m, bs in ((student, (3, 1)), (teacher, (4, 2))))
    pairs = [(s[i], t[j]) for i, j in ((3, 4), (1, 2))]
    plain = sum(
        (relation_logits(a["q"], a["k"], 4) - relation_logits(b["q"], b["k"], 4)).square().mean() for a, b in pairs
    )
    torch.testing.assert_close(losses["attention"], plain, rtol=1e-5, atol=0, check_dtype=False)
    weight = student.blocks[0].attn.qkv.weight
    (got,), (wanted,) = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (losses["attention"], plain))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_a_map_that_copies_heads_changes_nothing():
    """The identity over heads gives the loss of the logits as they are."""
    student, teacher = vit(num_heads=4), vit(32, 5, 4)
    mapped = DMAE(student, teacher, **SMALL)
    mapped.head_maps[0].weight.data.copy_(torch.eye(4)[:, :, None, None])
    plain = DMAE(student, teacher, head_map=False, **SMALL)
    a, b = (method.losses(images(), orders())["attention"] for method in (mapped, plain))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_both_sides_see_the_same_patches_and_nothing_else():
    """Masked pixels change the pixel loss only."""
    method = DMAE(vit(), vit(32, 4, 4), **SMALL).eval()
    order, x = orders(1), images(1)
    changed = x.clone()
    for patch in order[0, 4:].tolist():
        row, column = divmod(patch, 4)
        changed[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += torch.randn(3, 16, 16)
    a, b = method.losses(x, order), method.losses(changed, order)
    assert torch.equal(a["attention"], b["attention"])
    assert not torch.equal(a["pixel"], b["pixel"])


def test_the_pixel_loss_is_that_of_the_masked_autoencoder():
    """As MAE computes it from the same order."""
    method = DMAE(vit(), vit(32, 4, 4), **SMALL).eval()
    alone: MAE = method.mae
    torch.testing.assert_close(method.losses(images(), orders())["pixel"], alone.losses(images(), orders())["pixel"])


def test_hidden_states_are_what_the_next_layer_reads():
    """0 is the embedding, the last one comes after the final norm; of timm's models, too."""
    student, teacher = vit(), timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, depth=4)
    method = DMAE(student, teacher, hidden=[0, (2, 4), (3, 1)], **SMALL).eval()
    order, x = orders(), images()
    losses = method.losses(x, order)
    assert set(losses) == {"pixel", "attention", "hidden", "loss"}
    torch.testing.assert_close(losses["loss"], losses["pixel"] + losses["attention"] + losses["hidden"])
    keep = order[:, :4]

    def states(model):
        seen = []
        norms = [*(block.norm1 for block in model.blocks), model.norm]
        handles = [norm.register_forward_hook(lambda _, __, out: seen.append(out)) for norm in norms]
        read(model, x, {len(model.blocks): ("output",)}, keep)
        model.norm(read(model, x, {len(model.blocks): ("output",)}, keep)[len(model.blocks)]["output"])
        for handle in handles:
            handle.remove()
        return [*seen[: len(model.blocks)], seen[-1]]

    s, t = states(student), states(teacher)
    wanted = sum(
        (method.hidden_maps[i](s[a]) - t[b]).square().mean() for i, (a, b) in enumerate([(0, 0), (2, 4), (3, 1)])
    )
    torch.testing.assert_close(losses["hidden"], wanted)


def test_d2mae_decouples_pixels_from_attention():
    """Pixels reach the blocks up to the eighth, attention all of them; the final norm learns what it will see."""
    student = create_model("tinymim_vit_tiny", img_size=64, embed_dim=24, num_heads=2)
    method = D2MAE(student, vit(32, 4, 4), **SMALL)
    assert method.decode_block == 8
    assert method.pairs == [(13, 4)]
    losses = method.losses(images(), orders())
    blocks = {name: p for name, p in student.named_parameters() if p.requires_grad}
    pixel = torch.autograd.grad(losses["pixel"], [*blocks.values()], retain_graph=True, allow_unused=True)
    attention = torch.autograd.grad(losses["attention"], [*blocks.values()], retain_graph=True, allow_unused=True)
    for name, p, a in zip(blocks, pixel, attention, strict=True):
        number = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        assert (p is not None) == (number < 8), name
        assert a is not None, name
    losses["loss"].backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # DistributedDataParallel waits for all of them


def test_d2mae_compares_the_block_after_the_last():
    """Its queries and keys come from the encoder's own output."""
    student, teacher = vit(), vit(32, 4, 4)
    method = D2MAE(student, teacher, **SMALL).eval()
    order, x = orders(), images()
    tokens = student.norm(read(student, x, {3: ("output",)}, order[:, :4])[3]["output"])
    q, k = method.extra.qk(tokens).chunk(2, -1)
    t = read(teacher, x, {4: ("q", "k")}, order[:, :4])[4]
    wanted = (method.head_maps[0](relation_logits(q, k, 2)) - relation_logits(t["q"], t["k"], 4)).square().mean()
    torch.testing.assert_close(method.losses(x, order)["attention"], wanted)


def test_teachers_of_other_normalisation_and_patch_size():
    """The teacher sees the same pixels, normalised for it, resized until its grid is the student's."""
    student = vit()
    teacher = ViT(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    method = DMAE(student, teacher, align="image", normalisation=(mean, std), **SMALL).eval()
    seen = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(1, 3, 1, 1).expand(2, 3, 64, 64)
    own = [torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    method.losses((pixels - own[0]) / own[1], orders())
    wanted = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(seen[0], wanted[:, :, :32, :32], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"),
    [
        ({}, {}, dict(student_blocks=[4]), "block 4 does not exist in the student"),
        ({}, {}, dict(teacher_blocks=[0]), "block 0 does not exist in the teacher"),
        ({}, {}, dict(student_blocks=[2, 3]), "compared in pairs"),
        ({}, {}, dict(student_blocks=[], teacher_blocks=[]), "compared in pairs"),
        ({}, {}, dict(hidden=[4]), "does not exist"),
        ({}, {}, dict(hidden=[(1, 2, 3)]), "does not exist"),
        ({}, dict(num_heads=4, embed_dim=32), dict(head_map=False), "head_map=False with 2 heads"),
        ({}, dict(patch_size=8), {}, "patches"),
        (dict(rel_pos_bias=True), {}, {}, "relative position"),
        (dict(dist_token=True), {}, {}, "2 prefix tokens"),
    ],
)
def test_bad_input(student, teacher, options, words):
    with pytest.raises(ConfigError, match=words):
        DMAE(vit(**student), vit(**teacher), **options)


@pytest.mark.parametrize("recipe", ["dmae_tiny_from_mae_base", "d2mae_tiny_from_mae_base"])
def test_a_run_resumes_exactly(recipe, tmp_path):
    """By recipe, from a teacher's file: stopped after two of four steps and resumed, the same student."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 44, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    save_student(vit(32, 4, 4), tmp_path / "teacher.pth")
    options = dict(
        data=tmp_path / "photos",
        teacher=str(tmp_path / "teacher.pth"),
        img_size=64,
        batch_size=4,
        max_steps=4,
        save_every=2,
        workers=0,
        device="cpu",
        cfg_options={
            "student_args": dict(embed_dim=24, depth=3, num_heads=2),
            "decoder": SMALL["decoder"],
            "hidden": [[1, 2]],
            "precision": "fp32",
            "watch_every": 0,
        },
    )
    whole = distill(recipe, **options, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (last,) = (tmp_path / "stopped" / "checkpoints").glob("*4*.pth")
    last.unlink()
    resumed = distill(recipe, **options, out=tmp_path / "stopped", resume=True)
    a, b = (torch.load(r.student, weights_only=True) for r in (whole, resumed))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert a["meta"]["config"]["depth"] == 3
    assert not [key for key in a["model"] if "extra" in key or "decoder" in key or "map" in key]


def test_bad_input_of_d2mae():
    with pytest.raises(ConfigError, match="decode_block=9"):
        D2MAE(vit(), vit(), decode_block=9)
    with pytest.raises(ConfigError, match="an order of the shape"):
        D2MAE(vit(), vit()).losses(images(), orders(patches=9))
    with pytest.raises(ConfigError, match="block 5 does not exist in the student"):
        D2MAE(vit(), vit(), student_blocks=[5])
