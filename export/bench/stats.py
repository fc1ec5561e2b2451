"""Intervals that say how far a measured figure may be off, and whether two figures differ at all. numpy only.

Everything is a seeded percentile bootstrap with 95 % intervals (Efron 1979). Times of one series are no independent
draws (a busy neighbour slows several runs in a row), so runs are drawn in blocks of neighbours (moving blocks, Kuensch
1989), and where two files were timed in turns the same rounds are drawn for both. mIoU is drawn over photos, the same
photos for both files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinymim.confusion import mean_iou
from tinymim.errors import DataError

LEVEL = 0.95
RESAMPLES = 2000
DRIFT = 0.05  # how much the second half of a series may differ from the first before it counts as unsteady


def bootstrap_median(ms: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median of a series of times.

    Args:
        ms: Times in the order they were measured, at least one.
        seed: Of the draws.

    Returns:
        (low, high), in the unit of ``ms``.
    """
    return _interval(_drawn_medians(ms, seed))


def ratio_interval(ms_a: Sequence[float], ms_b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of ``ms_a`` over median of ``ms_b`` and its 95 % interval: how many times faster b is than a.

    Args:
        ms_a: Times of the baseline.
        ms_b: Times of the other file. Series of one length were timed in turns: round i of both belongs together.
        seed: Of the draws.

    Returns:
        (ratio, low, high).
    """
    together = len(ms_a) == len(ms_b)
    ratios = _drawn_medians(ms_a, seed) / _drawn_medians(ms_b, seed if together else seed + 1)
    return float(np.median(ms_a) / np.median(ms_b)), *_interval(ratios)


def pairwise_ratio(ms_a: Sequence[float], ms_b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """How many times faster b is than a, round by round: the median of a's time over b's, and its 95 % interval.

    The machine's pace in a round slows both alike and drops out, which it does not of two medians over all rounds.

    Args:
        ms_a: Times of the baseline.
        ms_b: Times of the other file, measured in turns with it: round i of both belongs together.
        seed: Of the draws.

    Returns:
        (ratio, low, high).
    """
    ratios = np.asarray(ms_a, np.float64) / np.asarray(ms_b, np.float64)
    return float(np.median(ratios)), *bootstrap_median(ratios.tolist(), seed)


def distinguishable(low: float, high: float, than: float = 1.0) -> bool:
    """Whether an interval leaves out ``than``: 1 for ratios ("as fast as"), 0 for differences ("as good as")."""
    return not low <= than <= high


def drift(ms: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the second half of a series over that of its first half and its 95 % interval.

    Returns:
        (ratio, low, high); above 1 the machine became slower while it measured (heat, a neighbour).
    """
    half = len(ms) // 2
    first, second = ms[:half], ms[half:]
    if not half:
        return 1.0, 1.0, 1.0
    ratios = _drawn_medians(second, seed) / _drawn_medians(first, seed + 1)
    return float(np.median(second) / np.median(first)), *_interval(ratios)


def unsteady(ms: Sequence[float], seed: int = 0) -> bool:
    """Whether a series drifted by more than :data:`DRIFT`, beyond what chance explains."""
    _, low, high = drift(ms, seed)
    return low > 1 + DRIFT or high < 1 - DRIFT


def bootstrap_miou(result: Any, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mIoU, drawn over photos.

    Args:
        result: With ``right_IC``, ``labelled_IC`` and ``predicted_IC``: int64 (photos, classes).
        seed: Of the draws.

    Returns:
        (low, high), fractions.
    """
    return _interval(_drawn_miou(result, _photo_weights(len(result.right_IC), seed)))


def bootstrap_miou_drop(a: Any, b: Any, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mIoU(a) - mIoU(b), the same photos drawn for both; positive: b is worse.

    Args:
        a: Result of the original (see :func:`bootstrap_miou`), with ``names`` of the photos.
        b: Result of the other file on the same photos.
        seed: Of the draws.

    Returns:
        (low, high), fractions.

    Raises:
        DataError: the two were scored on different photos or classes.
    """
    if list(a.names) != list(b.names) or a.right_IC.shape != b.right_IC.shape:
        raise DataError(
            "two scores of different photos cannot be paired",
            f"one saw {len(a.names)} photos of {a.right_IC.shape[1]} classes, the other {len(b.names)} of "
            f"{b.right_IC.shape[1]}",
            "score both files on the same folder with the same --limit",
        )
    weights = _photo_weights(len(a.names), seed)
    return _interval(_drawn_miou(a, weights) - _drawn_miou(b, weights))


def _drawn_miou(result: Any, weights_RI: np.ndarray) -> np.ndarray:
    """mIoU of every draw, (R,). Counts stay below 2^53, so float64 sums are exact."""
    counts = (
        weights_RI @ np.asarray(x, np.float64) for x in (result.right_IC, result.labelled_IC, result.predicted_IC)
    )
    return mean_iou(*counts)


def _photo_weights(photos: int, seed: int) -> np.ndarray:
    """How often each photo is drawn, (R, I)."""
    return np.random.default_rng(seed).multinomial(photos, np.full(photos, 1 / photos), RESAMPLES).astype(np.float64)


def _drawn_medians(ms: Sequence[float], seed: int) -> np.ndarray:
    """Median of every draw, (R,): blocks of neighbouring runs, the end followed by the start.

    One seed and one length give the same rounds, which is what pairs two series.
    """
    values, n = np.asarray(ms, np.float64), len(ms)
    block = max(1, int(n ** (1 / 3)) - 1)
    starts_RK = np.random.default_rng(seed).integers(0, n, (RESAMPLES, -(-n // block)))
    medians = []
    for part in np.array_split(starts_RK, -(-RESAMPLES * n // 4_000_000)):  # a few MiB at once
        rounds = ((part[:, :, None] + np.arange(block)) % n).reshape(len(part), -1)[:, :n]
        medians.append(np.median(values[rounds], axis=1))
    return np.concatenate(medians)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.nanpercentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
