"""The published losses and gradients, as numbers."""

import numpy as np
import pytest
import torch

import tinymim
from tinymim.distill import TinyMIM, qkv_at, relation_logits
from tinymim.models import ViT
from tinymim.models.mae import MAE


def build(golden, prefix, shapes, **config):
    model = ViT(**config)
    tinymim.load_weights(model, {"model": golden.state(prefix, shapes)})
    return model.eval()


def check_gradients(model, expected):
    """Norm to 1e-5 relative, first element to 1e-4 relative + 1e-7 (golden/README)."""
    parameters = dict(model.named_parameters())
    for name, (norm, first) in expected.items():
        grad = parameters[name].grad
        assert grad is not None, name
        assert float(grad.norm()) == pytest.approx(norm, rel=1e-5), name
        assert float(grad.flatten()[0]) == pytest.approx(first, rel=1e-4, abs=1e-7), name


def test_tinymim_loss_a(golden):
    """Losses, teacher relations, gradients, and the parameters that get none."""
    numbers, arrays = golden("tinymim_loss_a")
    keys = ("embed_dim", "depth", "num_heads", "img_size", "patch_size")
    teacher, student = (
        build(golden, f"{side}/", numbers[f"{side}_shapes"], **{k: numbers[side][k] for k in keys})
        for side in ("teacher", "student")
    )
    draw = np.random.RandomState(numbers["input_seed"])
    view = draw.standard_normal((2, 3, 64, 64))
    teacher_images = torch.from_numpy(view.astype("float32"))
    student_images = torch.from_numpy((view + 0.1 * draw.standard_normal(view.shape)).astype("float32"))
    method = TinyMIM(student, teacher, target_block=numbers["teacher"]["target_block"])
    method.eval()
    losses = method.losses(student_images, teacher_images)
    assert float(losses["qk"].detach()) == pytest.approx(numbers["qk_loss"], rel=1e-5)
    assert float(losses["vv"].detach()) == pytest.approx(numbers["vv_loss"], rel=1e-5)

    taps = qkv_at(teacher, teacher_images, 4)
    relations = [relation_logits(taps[a], taps[b], 4).softmax(-1).detach().numpy() for a, b in ("qk", "vv")]
    for got, name in zip(relations, sorted(arrays.files), strict=True):
        np.testing.assert_allclose(got, arrays[name], atol=2e-6 * np.abs(arrays[name]).max(), rtol=0)

    losses["loss"].backward()
    check_gradients(student, numbers["grad_norm_and_first"])
    none = {n for n, p in student.named_parameters() if p.grad is None}
    assert none == set(numbers["no_grad"])
    assert all(p.grad is None for p in teacher.parameters())


def test_mae_loss(golden):
    """MAE's reconstruction loss and its gradients' finiteness on the published masking."""
    numbers, _ = golden("mae_lite_distill")
    side = numbers["student"]
    encoder = ViT(**{k: side[k] for k in ("embed_dim", "depth", "num_heads", "img_size", "patch_size")})
    mae = MAE(
        encoder,
        decoder_dim=side["decoder_embed_dim"],
        decoder_depth=side["decoder_depth"],
        decoder_heads=side["decoder_num_heads"],
        mask_ratio=numbers["mask_ratio"],
    )
    state = golden.state("student/", numbers["student_shapes"])
    own = {(k if "decoder" in k or k == "mask_token" else f"encoder.{k}"): v for k, v in state.items()}
    missing, unexpected = mae.load_state_dict(own, strict=False)
    assert missing == ["encoder.pos_embed"]
    assert unexpected == []
    images = np.random.RandomState(numbers["input_seed"]).standard_normal((2, 3, 64, 64))
    losses = mae.eval().losses(torch.from_numpy(images).float(), torch.tensor(numbers["ids_shuffle"]))
    assert float(losses["loss"].detach()) == pytest.approx(numbers["mae_loss"], rel=1e-5)
