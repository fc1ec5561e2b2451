"""Losses on a classifier's logits: sparse targets against the dense distribution that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from tinymim.distill.logits import soft_distillation, sparse_cross_entropy


def case(classes=11, kept=3, batch=4):
    """Logits that need gradients, and a teacher's K largest probabilities as float16 keeps them."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, classes, generator=generator, requires_grad=True)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    values, indices = teacher.softmax(1).topk(kept)
    return student, teacher, values.half(), indices


def dense(values, indices, classes):
    """The distribution of TinyViT's section 3.1, class by class."""
    rest = (1 - values.double().sum(1, keepdim=True)) / max(classes - values.shape[1], 1)
    return rest.expand(-1, classes).clone().scatter(1, indices, values.double())


@pytest.mark.parametrize("kept", [1, 3, 10])
def test_the_rest_is_spread_evenly(kept):
    student, _, values, indices = case(kept=kept)
    target = dense(values, indices, 11)
    wanted = -(target * F.log_softmax(student.double(), 1)).sum(1).mean()
    loss = sparse_cross_entropy(student, values, indices)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, ((student.softmax(1) - target) / len(student)).float(), atol=1e-6)


def test_all_classes_are_the_teachers_distribution():
    student, teacher, _, _ = case()
    values, indices = teacher.softmax(1).topk(11)
    for tau in (1.0, 2.0):
        own = soft_distillation(student, teacher, tau)  # differs by the teacher's entropy
        soft = (teacher / tau).softmax(1)
        entropy = -(soft * soft.log()).sum(1).mean() * tau**2
        assert float(sparse_cross_entropy(student, values, indices, tau)) == pytest.approx(
            float(own + entropy), rel=1e-5
        )


def test_temperature_of_the_distribution_with_its_spread_rest():
    student, _, values, indices = case()
    target = dense(values, indices, 11) ** 0.25
    target /= target.sum(1, keepdim=True)
    wanted = -16 * (target * F.log_softmax(student.double() / 4, 1)).sum(1).mean()
    assert float(sparse_cross_entropy(student, values, indices, 4.0)) == pytest.approx(float(wanted), rel=1e-5)


def test_probabilities_that_sum_to_more_than_one_are_divided_by_their_sum():
    student = torch.tensor([[0.3, -1.0, 0.5, 2.0]], requires_grad=True)
    values, indices = torch.tensor([[0.75, 0.2505]]).half(), torch.tensor([[2, 0]])
    assert float(values.float().sum()) > 1
    share = values.double() / values.double().sum()
    wanted = -(share * F.log_softmax(student.double(), 1)[:, [2, 0]]).sum()
    loss = sparse_cross_entropy(student, values, indices)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[0, [1, 3]] > 0).all()  # no negative mass pulls the others


def test_half_precision_logits_are_compared_in_float32():
    student, _, values, indices = case()
    half = student.detach().bfloat16()
    assert torch.equal(sparse_cross_entropy(half, values, indices), sparse_cross_entropy(half.float(), values, indices))
