"""Crops for training: draws, resizes, colour jitter on the host and on a device."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.photographs import photograph
from tinymim.data.jitter import CHANGES, apply_jitter, draw_jitter
from tinymim.data.photos import Photos, color_jitter, resize, to_tensor


@pytest.fixture
def photos(tmp_path):
    """Three JPEGs, the second with a head that can be read and half of its pixels."""
    for i in range(3):
        photograph(i, (150 + 30 * i, 260)).save(tmp_path / f"{i}.jpg", quality=95)
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    return sorted(tmp_path.iterdir())


def test_both_ways_to_decode_draw_the_same_crop(photos):
    """Also of the photo that replaces a damaged one, whose size was known."""
    for index in range(3):
        views = [Photos(photos, img_size=32, jitter=0.4, decode=kind)[(2, index)] for kind in ("whole", "crop")]
        for name in ("image", "student_image"):
            one, two = (view[name].int() for view in views)
            assert (one - two).abs().float().mean() < 6
            assert (one - one.flip(-1)).abs().float().mean() > 8  # a flip, or another crop, would be seen
        assert views[0]["skipped"] == views[1]["skipped"] == ([str(photos[1])] if index == 1 else [])


@pytest.mark.parametrize("size", [(64, 64), (200, 33), (61, 224)])
def test_resize_is_pillows(size):
    photo = photograph(4, (97, 141))
    ours, pillows = (
        np.asarray(each, int) for each in (resize(photo, size), photo.resize(size, Image.Resampling.BICUBIC))
    )
    assert ours.shape == pillows.shape
    assert abs(ours - pillows).max() <= 1
    assert resize(photo, photo.size) is photo


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_jitter_of_a_batch_is_pillows_to_the_bit(device):
    drawn = [draw_jitter(strength, random.Random(i)) for i, strength in enumerate([0.4, 0.4, 0.4, 0.9, 2.0, 0.0] * 3)]
    photos = [photograph(i, (48, 48)) for i in range(len(drawn))]
    photos[1], photos[2] = Image.new("RGB", (48, 48), "white"), Image.new("RGB", (48, 48))
    wanted = torch.stack(
        [to_tensor(color_jitter(photo, changes)) for photo, changes in zip(photos, drawn, strict=True)]
    )
    rows = torch.tensor([[(CHANGES.index(change), factor) for change, factor in changes] for changes in drawn])
    images = torch.stack([to_tensor(photo) for photo in photos])
    assert torch.equal(apply_jitter(images.to(device), rows.to(device)).cpu(), wanted)
    assert (images - wanted).float().abs().mean() > 5


def test_a_photo_whose_jitter_is_left_to_the_model(photos):
    here, later = (Photos(photos, img_size=32, jitter=0.4, jitter_later=later)[(0, 0)] for later in (False, True))
    assert {*later} == {"image", "jitter", "skipped"}
    assert torch.equal(here["image"], later["image"])
    assert torch.equal(apply_jitter(later["image"][None], later["jitter"][None])[0], here["student_image"])
