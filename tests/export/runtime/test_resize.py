"""OpenCV's and PyTorch's bilinear interpolation and MMCV's size rule, in numpy."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmcv.image.geometric import rescale_size as mmcv_rescale_size
from PIL import Image

from tinymim_export.runtime.resize import (
    bands,
    largest,
    numpy_bilinear,
    rescale_size,
    resize_bilinear,
    resize_float,
    resize_nearest,
    resized_planes,
)

SIDE = st.one_of(st.integers(1, 9), st.integers(1, 150))
PROPERTY = settings(max_examples=200, deadline=None)


def same_as_opencv(height, width, size, channels, seed=0):
    random = np.random.default_rng(seed)
    shape = (height, width) if channels == 1 else (height, width, channels)
    for image in (random.integers(0, 256, shape, np.uint8), random.choice(np.uint8([0, 255]), shape)):
        wanted = cv2.resize(image, (size[1], size[0]))
        for resize in (resize_bilinear, numpy_bilinear):  # by OpenCV itself, and without it
            np.testing.assert_array_equal(resize(image, size), wanted)


@PROPERTY
@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from([1, 3]), st.integers(0, 99))
@example(1, 1, 7, 5, 3, 0)
@example(8, 9, 1, 1, 1, 0)
@example(40, 50, 40, 77, 3, 0)
def test_photos_are_resized_as_opencv_does(height, width, to_height, to_width, channels, seed):
    same_as_opencv(height, width, (to_height, to_width), channels, seed)


@PROPERTY
@given(SIDE, SIDE, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))
@example(20, 30, 2, 2, 3)
def test_whole_factors_up_and_down(height, width, by_height, by_width, channels):
    """Exactly half in both directions is another path in OpenCV; half in one direction is not."""
    small, large = (height, width), (height * by_height, width * by_width)
    same_as_opencv(*large, small, channels)
    same_as_opencv(*small, large, channels)


@settings(max_examples=50, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
@example(20, 30, 10, 15)
def test_floats_are_resized_as_opencv_does(height, width, to_height, to_width):
    image = np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32)
    wanted = cv2.resize(image, (to_width, to_height))
    for resize in (resize_bilinear, numpy_bilinear):
        np.testing.assert_allclose(resize(image, (to_height, to_width)), wanted, rtol=0, atol=3e-3)


@pytest.mark.parametrize("sizes", [((360, 480), (512, 683)), ((1500, 2000), (512, 683)), ((683, 1024), (1365, 2047))])
def test_sizes_of_real_photos(sizes):
    same_as_opencv(*sizes[0], sizes[1], 3)


def test_pillow_would_not_do(shared):
    """Why this file exists: on a real photo Pillow's bilinear is tens of levels away from OpenCV's."""
    path = sorted((shared / "data" / "camvid" / "images" / "validation").iterdir())[0]
    with Image.open(path) as image:
        photo = np.asarray(image.convert("RGB"))
        pillow = np.asarray(image.resize((240, 180), Image.Resampling.BILINEAR)).astype(int)
        odd = np.asarray(image.resize((213, 160), Image.Resampling.BILINEAR)).astype(int)
    for size, other in (((180, 240), pillow), ((160, 213), odd)):
        ours = numpy_bilinear(photo, size)
        np.testing.assert_array_equal(ours, cv2.resize(photo, (size[1], size[0])))
        assert np.abs(ours - other).max() > 20


@PROPERTY
@given(st.integers(1, 3000), st.integers(1, 3000), st.tuples(st.integers(1, 2048), st.integers(1, 2048)))
def test_size_with_kept_ratio(height, width, scale):
    wanted = mmcv_rescale_size((width, height), scale)
    assert rescale_size((height, width), scale) == (max(wanted[1], 1), max(wanted[0], 1))


@PROPERTY
@given(SIDE, SIDE, SIDE, SIDE, st.booleans())
@example(1, 1, 6, 6, True)
@example(9, 9, 1, 1, True)
def test_logits_are_resized_as_torch_does(height, width, to_height, to_width, align_corners):
    values = np.random.default_rng(0).standard_normal((4, height, width)).astype(np.float32)
    ours, theirs = (
        resize_float(values, (to_height, to_width), align_corners),
        torch_resize(values, to_height, to_width, align_corners),
    )
    assert ours.dtype == np.float32
    # PyTorch's other kernel, for tiny images, rounds positions once: they differ by about 1e-7 of the side
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 + 2.4e-7 * max(height, width) * np.ptp(values))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", [((128, 171), (512, 683)), ((512, 512), (375, 500)), ((180, 240), (360, 480))])
def test_logits_of_real_sizes_to_1e_6(sizes, align_corners):
    values = np.random.default_rng(0).standard_normal((11, *sizes[0])).astype(np.float32)
    ours, theirs = resize_float(values, sizes[1], align_corners), torch_resize(values, *sizes[1], align_corners)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(values).max())
    assert (ours.argmax(0) == theirs.argmax(0)).all()


def torch_resize(values, height, width, align_corners):
    return F.interpolate(torch.from_numpy(values)[None], (height, width), mode="bilinear", align_corners=align_corners)[
        0
    ].numpy()


def test_bands_are_the_whole(monkeypatch):
    monkeypatch.setattr("tinymim_export.runtime.resize.BAND", 5 * 40 * 7)
    values = np.random.default_rng(0).standard_normal((5, 13, 17)).astype(np.float32)
    parts = list(bands(values, (31, 40), False))
    assert [rows.stop - rows.start for rows, _ in parts] == [7, 7, 7, 7, 3]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], 1), resize_float(values, (31, 40)))


def test_nearest_mixes_no_ids():
    mask = np.array([[1, 9], [4, 7]], np.uint8)
    assert resize_nearest(mask, (4, 4)).tolist() == [[1, 1, 9, 9], [1, 1, 9, 9], [4, 4, 7, 7], [4, 4, 7, 7]]
    assert resize_nearest(resize_nearest(mask, (6, 10)), (2, 2)).tolist() == mask.tolist()


@pytest.mark.parametrize("size", [(360, 480), (64, 64), (41, 300)])
def test_masks_of_opencvs_resize_are_those_of_pytorchs(size):
    logits = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((128, 128, 11)).astype(np.float32), (0, 0), 2)
    logits = np.ascontiguousarray(logits.transpose(2, 0, 1))
    mask = largest(resized_planes(logits, size))
    assert mask.dtype == np.uint8
    assert (mask == resize_float(logits, size).argmax(0)).mean() > 0.999
    assert resized_planes(logits, (1 << 15, 2)) is None


@PROPERTY
@given(st.integers(2, 200), st.integers(1, 3), st.integers(0, 99))
def test_largest_is_argmax_with_ties(channels, levels, seed):
    values = np.random.default_rng(seed).integers(0, levels, (channels, 5, 7)).astype(np.float32)
    np.testing.assert_array_equal(largest(values), values.argmax(0))
