"""What MMSegmentation resizes with: OpenCV's bilinear for photos, PyTorch's for logits.

Photos go through OpenCV itself where it is installed, else through numpy, which gives the same pixels. Not so logits:
OpenCV's float resize is up to 2e-4 away from PyTorch's; only masks, which need no more than the largest of them, are
made of it. OpenCV computes bilinear uint8 in fixed point (11-bit weights, two roundings); Pillow's filter is another
one and differs by up to 62 levels on a photo, enough to move a mask. Bit-exact against OpenCV 4 and 5 on x86.

Legend: C = channels or classes, H, W = sides in pixels; sizes are (height, width).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

WEIGHT_BITS = 11  # of OpenCV's fixed-point weights
OPENCV_SIDE = 1 << 15  # pixels; OpenCV's own limit for some of its paths
BAND = 1 << 22  # float32 values held at once while logits are up-sampled (16 MiB)


@functools.cache
def import_opencv() -> Any:
    """OpenCV, or None where it cannot be imported."""
    try:
        import cv2
    except Exception:  # not installed, or broken in one of many ways (missing libraries, built for another numpy)
        return None
    return cv2


def rescale_size(size: tuple[int, int], scale: Sequence[int]) -> tuple[int, int]:
    """The size a photo gets with ``keep_ratio``: as large as fits ``scale``, long side to long side (MMCV's rule).

    Args:
        size: Height and width of the photo.
        scale: Two sides in pixels, in either order.

    Source: mmcv.image.geometric.rescale_size.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)``, uint8 bit for bit.

    Args:
        image: uint8 or float32, (H, W) or (H, W, C).
        size: Height and width of the result.

    Source: the behaviour of OpenCV's modules/imgproc/src/resize.cpp, held to it by tests.
    """
    have = image.shape[:2]
    if have == size:
        return image.copy()
    opencv = import_opencv()
    if opencv is not None and max(*have, *size) < OPENCV_SIDE:
        return opencv.resize(np.ascontiguousarray(image), (size[1], size[0])).reshape(*size, *image.shape[2:])
    return numpy_bilinear(image, size)


def numpy_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """:func:`resize_bilinear` of another size where OpenCV is not installed: the same pixels, in numpy."""
    have = image.shape[:2]
    if have == (2 * size[0], 2 * size[1]):  # OpenCV takes the average of four here
        if image.dtype != np.uint8:
            return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) * np.float32(0.25)
        wide = image.astype(np.uint16)
        return ((wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    if image.dtype != np.uint8:
        for axis in (1, 0):
            at, part = _positions(have[axis], size[axis])
            near = [np.clip(i, 0, have[axis] - 1) for i in (at, at + 1)]
            sides = (-1, *[1] * (image.ndim - 1 - axis))
            image = _mix(image, axis, near, [w.reshape(sides) for w in (np.float32(1) - part, part)])
        return image
    top, bottom, of_top, of_bottom = _fixed_point(have[0], size[0])
    left, right, of_left, of_right = _fixed_point(have[1], size[1], clamp=True)
    down, across = (-1, *[1] * (image.ndim - 1)), (1, -1, *[1] * (image.ndim - 2))
    used, back = np.unique(np.concatenate([top, bottom]), return_inverse=True)  # a small result needs few rows
    rows = image[used]
    mixed = np.multiply(rows.take(left, 1), of_left.reshape(across), dtype=np.int32)
    mixed += np.multiply(rows.take(right, 1), of_right.reshape(across), dtype=np.int32)
    mixed >>= 4
    upper, lower = mixed.take(back[: size[0]], 0), mixed.take(back[size[0] :], 0)
    upper *= of_top.reshape(down)
    lower *= of_bottom.reshape(down)
    upper >>= 16
    lower >>= 16
    upper += lower
    upper += 2
    upper >>= 2
    return upper.astype(np.uint8)


def _fixed_point(have: int, want: int, clamp: bool = False) -> tuple[np.ndarray, ...]:
    """For one side: the two source indices of every target pixel and their int32 weights of 11 bits.

    OpenCV gives pixels beyond the border the weights 1 and 0 from left to right (``clamp``); from top to bottom it
    keeps both weights and takes the border row twice, which rounds differently.
    """
    first, part = _positions(have, want)
    if clamp:
        part[(first < 0) | (first >= have - 1)] = 0
    one = np.float32(1 << WEIGHT_BITS)
    weights = [np.rint(w * one).astype(np.int32) for w in (np.float32(1) - part, part)]
    return (*(np.clip(i, 0, have - 1) for i in (first, first + 1)), *weights)


def _positions(have: int, want: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of one side lie in the source: whole part (may be -1) and float32 fraction."""
    at = ((np.arange(want) + 0.5) * (1 / (want / have)) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    return first, at - first.astype(np.float32)


def resize_float(
    logits_CHW: np.ndarray, size: tuple[int, int], align_corners: bool = False, rows: slice = slice(None)
) -> np.ndarray:
    """``torch.nn.functional.interpolate(mode="bilinear")`` of float32 values, to 1e-6 of the largest.

    PyTorch has two kernels on the CPU. This is the one for images of 4 and more channels; the one for few channels or
    tiny images rounds positions once instead of twice and differs by about 1e-7 times the side.

    Args:
        logits_CHW: float32 (C, H, W).
        size: Height and width of the result.
        align_corners: PyTorch's switch; MMSegmentation's heads have one of that name.
        rows: Part of the result's rows to compute.

    Returns:
        float32 (C, rows, width).
    """
    top, bottom, of_top, of_bottom = (v[rows] for v in _taps(logits_CHW.shape[1], size[0], align_corners))
    left, right, of_left, of_right = _taps(logits_CHW.shape[2], size[1], align_corners)
    start, stop = int(top.min()), int(bottom.max()) + 1
    band = logits_CHW[:, start:stop]
    if logits_CHW.shape[2] != size[1]:
        band = _mix(band, 2, (left, right), (of_left, of_right))
    if logits_CHW.shape[1] != size[0]:
        band = _mix(band, 1, (top - start, bottom - start), (of_top[:, None], of_bottom[:, None]))
    return band


def _mix(values: np.ndarray, axis: int, at: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> np.ndarray:
    """Weighted sum of two neighbours along an axis."""
    out = values.take(at[0], axis)
    out *= weights[0]
    more = values.take(at[1], axis)
    more *= weights[1]
    out += more
    return out


def _taps(have: int, want: int, align_corners: bool) -> tuple[np.ndarray, ...]:
    """For one side: the two source indices of every target value and their float32 weights, as PyTorch has them."""
    i = np.arange(want, dtype=np.float32)
    if align_corners:
        at = i * np.float32((have - 1) / (want - 1) if want > 1 else 0)
    else:
        at = np.maximum((i + np.float32(0.5)) * np.float32(have / want) - np.float32(0.5), np.float32(0))
    first = np.minimum(at.astype(np.int64), have - 1)
    part = np.clip(at - first.astype(np.float32), np.float32(0), np.float32(1))
    return first, np.minimum(first + 1, have - 1), np.float32(1) - part, part


def largest(planes_HW: Iterable[np.ndarray]) -> np.ndarray:
    """The first index of the largest value in every place: ``argmax(0)`` of a stack, one plane at a time.

    numpy's own argmax over the first axis is 100 times slower.

    Returns:
        uint8 (H, W).
    """
    planes = iter(planes_HW)
    best = next(planes).copy()
    ids = np.zeros(best.shape, np.uint8)
    for i, plane in enumerate(planes, 1):
        np.copyto(ids, np.uint8(i), where=plane > best)
        np.maximum(best, plane, out=best)
    return ids


def probability(logits_CHW: np.ndarray, ids_HW: np.ndarray) -> np.ndarray:
    """The probability of the ids that were decided on: softmax, or sigmoid where there is one channel.

    Args:
        logits_CHW: float32 (C, H, W).
        ids_HW: The index of the largest in every place; of one channel 0 or 1.

    Returns:
        float32 (H, W).
    """
    with np.errstate(over="ignore"):
        if len(logits_CHW) == 1:
            return 1 / (1 + np.exp(np.where(ids_HW > 0, -logits_CHW[0], logits_CHW[0])))
        best = logits_CHW.max(0)
        total = np.zeros_like(best)
        for plane in logits_CHW:
            total += np.exp(plane - best)
        return 1 / total


def resized_planes(logits_CHW: np.ndarray, size: tuple[int, int]) -> Iterable[np.ndarray] | None:
    """Channels at another size by OpenCV, (H, W) each, for :func:`largest`; None where OpenCV cannot."""
    if logits_CHW.shape[1:] == size:
        return logits_CHW
    opencv = import_opencv()
    if opencv is None or max(*logits_CHW.shape[1:], *size) >= OPENCV_SIDE:
        return None
    return (opencv.resize(plane, (size[1], size[0])) for plane in np.ascontiguousarray(logits_CHW))


def resize_nearest(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size: the nearest id, none is mixed."""
    if mask_HW.shape == size:
        return mask_HW
    rows, columns = (np.arange(want) * have // want for have, want in zip(mask_HW.shape, size, strict=True))
    return mask_HW[rows[:, None], columns]


def bands(logits_CHW: np.ndarray, size: tuple[int, int], align_corners: bool) -> Iterator[tuple[slice, np.ndarray]]:
    """Logits at another size, some rows at a time: 150 classes of a large photo need not fit the memory at once."""
    step = max(1, BAND // (logits_CHW.shape[0] * size[1]))
    for start in range(0, size[0], step):
        rows = slice(start, min(start + step, size[0]))
        yield rows, resize_float(logits_CHW, size, align_corners, rows)
