"""Batched windows and masks class by class: MMSegmentation's mask, bit for bit, from the same logits."""

import copy

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from tinymim.seg import inference
from tinymim.seg.config import find_config, merge_options, plain_batch_norm
from tinymim.seg.inference import predict

SLIDE = dict(mode="slide", crop_size=(64, 64), stride=(43, 43))


def model(small, **more):
    init_default_scope("mmseg")
    cfg = find_config("upernet_tinymim_demo")
    merge_options(cfg, small())
    plain_batch_norm(cfg)
    for key, value in more.items():
        cfg.model[key] = value
    torch.manual_seed(0)
    net = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(net.decode_head.conv_seg.weight)
    return net


def batch(*sizes):
    """Photos as the network sees them, (height, width), and their own sizes."""
    torch.manual_seed(1)
    samples = []
    for seen, own in sizes:
        samples.append(SegDataSample())
        samples[-1].set_metainfo(dict(ori_shape=own, img_shape=seen))
    photos = [torch.randint(0, 256, (3, *seen), dtype=torch.uint8) for seen, _ in sizes]
    return {"inputs": photos, "data_samples": samples}


def masks(step, net, photos):
    with torch.inference_mode():
        return [sample.pred_sem_seg.data for sample in step(copy.deepcopy(photos))]


def one_by_one(net, photos):
    pairs = zip(photos["inputs"], photos["data_samples"], strict=True)
    return [net.test_step({"inputs": [photo], "data_samples": [sample]})[0] for photo, sample in pairs]


MIXED = (((64, 80), (64, 80)), ((96, 80), (200, 170)), ((64, 80), (50, 61)), ((48, 150), (48, 150)))


@pytest.mark.parametrize("test_cfg", [SLIDE, dict(mode="whole")], ids=["slide", "whole"])
@pytest.mark.parametrize("values", [1, 1 << 30], ids=["a class at a time", "all classes"])
def test_the_mask_is_mmsegs(small, monkeypatch, test_cfg, values):
    """One window a pass: bit for bit. Several: where logits differ by rounding only, a pixel in thousands may."""
    net = model(small, test_cfg=test_cfg)
    photos = batch(*MIXED)
    wanted = masks(lambda each: one_by_one(net, each), net, photos)
    monkeypatch.setitem(inference.VALUES, "cpu", values)
    monkeypatch.setitem(inference.PIXELS, "cpu", 1)
    found = masks(lambda each: predict(net, each), net, photos)
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape
        assert b.dtype == torch.uint8
        assert torch.equal(a, b.long())
        assert len(a.unique()) > 2
    monkeypatch.setitem(inference.PIXELS, "cpu", 1 << 20)
    together = masks(lambda each: predict(net, each), net, photos)
    for a, b in zip(wanted, together, strict=True):
        assert (a != b).float().mean() < 1e-3


def test_windows_of_several_photos_share_a_pass(small, monkeypatch):
    net = model(small, test_cfg=SLIDE)
    counts = []
    monkeypatch.setattr(net.backbone, "trunk", lambda x, trunk=net.backbone.trunk: (counts.append(len(x)), trunk(x))[1])
    monkeypatch.setitem(inference.PIXELS, "cpu", 4 * 64 * 64)
    masks(lambda each: predict(net, each), net, batch(((64, 80), (64, 80)), ((96, 80), (96, 80)), ((64, 64), (64, 64))))
    assert counts == [4, 3]  # 2 + 4 + 1 windows


def test_one_class_with_a_threshold(small):
    base = find_config("upernet_tinymim_demo").model.decode_head
    head = {**base, "in_channels": [24] * 4, "channels": 16, "num_classes": 2, "out_channels": 1, "threshold": 0.4}
    head |= dict(norm_cfg=dict(type="BN"), loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True))
    net = model(small, decode_head=head, auxiliary_head=None)
    photos = batch(*MIXED[:2])
    for a, b in zip(
        masks(lambda each: one_by_one(net, each), net, photos),
        masks(lambda each: predict(net, each), net, photos),
        strict=True,
    ):
        assert torch.equal(a, b.float())
        assert len(b.unique()) == 2


def test_other_models_and_mirrored_photos_go_mmsegs_way(small, monkeypatch):
    photos = batch(*MIXED)
    net = model(small)
    wanted = masks(lambda each: one_by_one(net, each), net, photos)

    class Other(inference.EncoderDecoder):
        def predict(self, inputs, data_samples=None):
            return super().predict(inputs, data_samples)

    monkeypatch.setattr(net, "__class__", Other)
    for a, b in zip(wanted, masks(lambda each: predict(net, each), net, photos), strict=True):
        assert torch.equal(a, b)
    net = model(small)
    for sample in photos["data_samples"]:
        sample.set_metainfo(dict(flip=True, flip_direction="horizontal"))
    wanted = masks(lambda each: one_by_one(net, each), net, photos)
    for a, b in zip(wanted, masks(lambda each: predict(net, each), net, photos), strict=True):
        assert torch.equal(a, b)
