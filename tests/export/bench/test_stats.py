"""Intervals: coverage on made data, invariances, pairing, what counts as a difference."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinymim.confusion import mean_iou
from tinymim.errors import DataError
from tinymim_export.bench.stats import (
    bootstrap_median,
    bootstrap_miou,
    bootstrap_miou_drop,
    distinguishable,
    drift,
    pairwise_ratio,
    ratio_interval,
    unsteady,
)

TIMES = arrays(np.float64, st.integers(2, 40), elements=st.floats(0.5, 50))


@given(TIMES, st.floats(0.1, 10), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_medians_scale_and_stay_inside(ms, factor, seed):
    low, high = bootstrap_median(ms, seed)
    assert ms.min() <= low <= high <= ms.max()
    assert bootstrap_median(ms, seed) == (low, high)
    assert bootstrap_median(ms * factor, seed) == pytest.approx((low * factor, high * factor))
    assert bootstrap_median(np.full(7, factor)) == (factor, factor)


@given(TIMES, st.floats(0.2, 5))
@settings(max_examples=25, deadline=None)
def test_ratio_of_a_multiple_is_exact_because_rounds_are_paired(ms, factor):
    """However wild the machine: a file that takes twice as long in every round is twice as slow, without doubt."""
    assert ratio_interval(ms * factor, ms) == pytest.approx((factor,) * 3)
    ratio, low, high = ratio_interval(ms, ms[::-1].copy())
    assert low <= ratio * (1 + 1e-9)
    assert ratio == pytest.approx(1)
    assert high >= ratio * (1 - 1e-9)


def test_coverage_of_the_median():
    """About 95 of 100 intervals hold the true median, for skewed times, in short series too."""
    random = np.random.default_rng(0)
    truth = 10 + 3.6720607  # median of gamma(4)
    for length, at_least in ((12, 0.86), (60, 0.88)):
        hits = 0
        for i in range(120):
            low, high = bootstrap_median(10 + random.gamma(4, 1, length), i)
            hits += low <= truth <= high
        assert hits / 120 >= at_least
        assert hits / 120 < 1


def test_coverage_of_the_ratio_on_a_machine_that_drifts():
    """Both files slow down together: pairing keeps the interval on the true ratio, and narrow."""
    random = np.random.default_rng(1)
    hits, widths = 0, []
    for i in range(100):
        load = 1 + 0.3 * np.linspace(0, 1, 40) ** 2 + 0.2 * random.random(40)
        a, b = 20 * load * random.normal(1, 0.01, 40), 10 * load * random.normal(1, 0.01, 40)
        _, low, high = ratio_interval(a, b, i)
        hits += low <= 2 <= high
        widths.append(high - low)
    assert hits >= 88
    assert np.median(widths) < 0.1


def test_series_of_other_lengths_are_not_paired():
    random = np.random.default_rng(2)
    a, b = random.normal(20, 1, 30), random.normal(10, 1, 45)
    ratio, low, high = ratio_interval(a, b)
    assert low < ratio < high
    assert distinguishable(low, high)
    assert not distinguishable(low, high, than=2)


def test_what_is_distinguishable():
    assert distinguishable(1.01, 1.2)
    assert distinguishable(0.8, 0.99)
    assert not distinguishable(0.99, 1.2)
    assert not distinguishable(-0.1, 0.1, than=0)


def test_throttling_is_seen_and_noise_is_not():
    random = np.random.default_rng(3)
    calm = random.normal(10, 0.2, 60)
    assert not unsteady(calm)
    assert drift(calm)[0] == pytest.approx(1, abs=0.05)
    assert unsteady(np.concatenate([calm[:30], 1.3 * calm[30:]]))
    assert unsteady(np.concatenate([calm[:30], 0.8 * calm[30:]]))
    assert not unsteady(np.concatenate([calm[:30], 1.02 * calm[30:]]))  # within the 5 % that are forgiven
    assert not unsteady([10.0])


def score(right, labelled, predicted):
    names = [str(i) for i in range(len(right))]
    return SimpleNamespace(names=names, right_IC=right, labelled_IC=labelled, predicted_IC=predicted)


def made_scores(photos, accuracy, other, random):
    """Two files on the same photos of three classes; photos differ much in difficulty."""
    labelled = random.integers(200, 2000, (photos, 3))
    hard = random.uniform(0.5, 1, (photos, 1))
    out = []
    for value in (accuracy, other):
        right = (labelled * np.clip(value * hard, 0, 1)).astype(np.int64)
        wrong = labelled - right
        out.append(score(right, labelled, right + np.roll(wrong, 1, axis=1)))
    return out


def miou(result):
    return mean_iou(result.right_IC.sum(0), result.labelled_IC.sum(0), result.predicted_IC.sum(0))


def test_pairing_over_photos_makes_a_drop_visible():
    random = np.random.default_rng(5)
    a, b = made_scores(60, 0.9, 0.88, random)
    drop = miou(a) - miou(b)
    low, high = bootstrap_miou_drop(a, b)
    assert low < drop < high
    assert distinguishable(low, high, than=0)
    own = bootstrap_miou(a)
    assert own[0] < miou(a) < own[1]
    assert own[1] - own[0] > 3 * (high - low)  # the photos' own spread would hide it
    assert bootstrap_miou_drop(b, a) == pytest.approx((-high, -low))
    assert bootstrap_miou_drop(a, a) == (0, 0)


def test_order_of_classes_does_not_matter():
    a, b = made_scores(20, 0.9, 0.8, np.random.default_rng(6))
    turned = [score(x.right_IC[:, ::-1], x.labelled_IC[:, ::-1], x.predicted_IC[:, ::-1]) for x in (a, b)]
    assert bootstrap_miou_drop(*turned) == pytest.approx(bootstrap_miou_drop(a, b))


def test_coverage_of_the_drop():
    random = np.random.default_rng(7)
    big = made_scores(20_000, 0.9, 0.87, random)
    truth = miou(big[0]) - miou(big[1])
    hits = 0
    for _ in range(60):
        low, high = bootstrap_miou_drop(*made_scores(40, 0.9, 0.87, random))
        hits += low <= truth <= high
    assert hits >= 51


def test_scores_of_other_photos_are_refused():
    a, b = made_scores(10, 0.9, 0.8, np.random.default_rng(8))
    b.names = [*b.names[1:], "other"]
    with pytest.raises(DataError, match="different photos"):
        bootstrap_miou_drop(a, b)


def test_pairwise_ratios_are_blind_to_the_machines_pace():
    """Twice as fast in every round is twice as fast, however the machine's pace changed between them."""
    pace = np.exp(np.random.default_rng(0).normal(0, 0.5, 40)) * np.linspace(1, 3, 40)
    once = (10 * pace).tolist()
    assert pairwise_ratio(once, (5 * pace).tolist()) == pytest.approx((2, 2, 2))
    busy = (5 * pace * np.random.default_rng(1).normal(1, 0.02, 40)).tolist()
    ratio, low, high = pairwise_ratio(once, busy)
    assert 1.95 < low < ratio < high < 2.05
    _, wide_low, wide_high = ratio_interval(once, busy)
    assert wide_high - wide_low > 2 * (high - low)
