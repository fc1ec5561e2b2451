"""The pixel loss in strips: MMSegmentation's own loss, accuracy and gradient up to rounding, for every head it fits."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from tinymim.seg import loss as room
from tinymim.seg.loss import tile_losses, upsampled_cross_entropy


def head(**more):
    init_default_scope("mmseg")
    torch.manual_seed(0)
    base = dict(type="FCNHead", in_channels=6, in_index=0, channels=8, num_convs=1, num_classes=5, dropout_ratio=0.0)
    return MODELS.build({**base, "loss_decode": dict(type="CrossEntropyLoss", loss_weight=0.4), **more})


def samples(count, size, *, ignored=True):
    torch.manual_seed(1)
    labels = torch.randint(0, 5, (count, 1, *size))
    if ignored:
        labels[:, :, :3] = 255
    return [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


class Holder(torch.nn.Module):
    def __init__(self, decode_head, auxiliary_head=None):
        super().__init__()
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head


def losses(net, logits, labels):
    logits = logits.clone().requires_grad_(True)
    found = net.loss_by_feat(logits, labels)
    found["loss_ce"].backward()
    return found["loss_ce"].detach(), found["acc_seg"], logits.grad


@pytest.mark.parametrize("strip", [1, 700, 1 << 30], ids=["row by row", "some rows", "everything"])
@pytest.mark.parametrize("size", [(32, 32), (37, 29), (8, 8)], ids=["x4", "ragged", "same"])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_is_mmsegs_loss(monkeypatch, strip, size, align, labelled):
    monkeypatch.setitem(room.STRIP, "cpu", strip)
    options = dict(type="CrossEntropyLoss", loss_weight=0.4, avg_non_ignore=labelled)
    theirs, ours = (head(loss_decode=options, align_corners=align) for _ in range(2))
    tile_losses(Holder(ours))
    logits, labels = 5 * torch.randn(3, 5, 8, 8), samples(3, size)
    (a, b, c), (x, y, z) = losses(theirs, logits, labels), losses(ours, logits, labels)
    assert x.item() == pytest.approx(a.item(), rel=1e-6)
    assert y.shape == b.shape
    assert y.item() == pytest.approx(b.item(), rel=1e-6)
    assert (c - z).abs().max() <= 1e-6 * c.abs().max()


def test_gradient_in_float64():
    labels = torch.cat([sample.gt_sem_seg.data for sample in samples(2, (9, 7))])
    logits = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: upsampled_cross_entropy(x, labels, 255)[0], logits)


@pytest.mark.parametrize("strip", [1, 700, 1 << 30])
def test_class_weights_are_pytorchs(monkeypatch, strip):
    """MMSegmentation's loss with weights fails on pixels to ignore."""
    monkeypatch.setitem(room.STRIP, "cpu", strip)
    weight = [0.5, 2.0, 1.0, 3.0, 0.1]
    net = head(loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4, class_weight=weight))
    tile_losses(Holder(net))
    logits, labels = 5 * torch.randn(3, 5, 8, 8), samples(3, (37, 29))
    loss, _, gradient = losses(net, logits, labels)
    logits.requires_grad_(True)
    wide = torch.nn.functional.interpolate(logits, (37, 29), mode="bilinear", align_corners=net.align_corners)
    target = torch.stack([sample.gt_sem_seg.data for sample in labels]).squeeze(1)
    wanted = 0.4 * torch.nn.functional.cross_entropy(wide, target, torch.tensor(weight), ignore_index=255)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert (gradient - logits.grad).abs().max() <= 1e-6 * logits.grad.abs().max()


def test_nothing_labelled_and_large_logits_are_finite():
    logits = torch.full((1, 5, 2, 2), 1e4).requires_grad_(True)
    loss, accuracy = upsampled_cross_entropy(logits, torch.full((1, 8, 8), 255), 255, over_labelled=True)
    loss.backward()
    assert loss == 0
    assert torch.isfinite(accuracy).all()
    assert not logits.grad.any()


def test_a_loss_that_is_not_finite_stays_so():
    logits = torch.zeros(1, 5, 2, 2)
    logits[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(upsampled_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.int64), 255)[0])


def test_under_autocast_the_loss_is_float32():
    logits, labels = torch.randn(2, 5, 8, 8), samples(2, (32, 32))
    ours = head()
    tile_losses(Holder(ours))
    wanted = losses(ours, logits.bfloat16().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(ours, logits.bfloat16(), labels)
    assert torch.equal(found[0], wanted[0])
    assert found[2].dtype == torch.bfloat16
    assert torch.allclose(found[2].float(), wanted[2], rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(
    "more",
    [
        dict(loss_decode=[dict(type="CrossEntropyLoss"), dict(type="DiceLoss")]),
        dict(loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True)),
        dict(sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=10)),
        dict(type="STDCHead", loss_decode=[dict(type="CrossEntropyLoss"), dict(type="DiceLoss")]),
    ],
    ids=["two losses", "sigmoid", "sampler", "own loss"],
)
def test_other_losses_stay_mmsegs(more):
    net = head(**more)
    tile_losses(Holder(torch.nn.ModuleList([net, head()]), head()))
    assert "loss_by_feat" not in vars(net)


def test_the_heads_of_a_cascade_and_the_auxiliary_one():
    heads = [head() for _ in range(3)]
    tile_losses(Holder(torch.nn.ModuleList(heads[:2]), heads[2]))
    assert all("loss_by_feat" in vars(each) for each in heads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu():
    logits, labels = 5 * torch.randn(3, 5, 8, 8), torch.cat([s.gt_sem_seg.data for s in samples(3, (37, 29))])
    found = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_(True)
        loss, accuracy = upsampled_cross_entropy(x, labels.to(device), 255)
        loss.backward()
        found.append((loss.detach().cpu(), accuracy.cpu(), x.grad.cpu()))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
