"""One confusion matrix and one mIoU: against counting by hand, and bit for bit against the formulas it replaced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.confusion import class_counts, class_iou, confusion_matrix, matrix_of_ids, mean_iou, scores
from tinymim.errors import DataError


@st.composite
def matrices(draw):
    """Confusion matrices with classes that occur nowhere, only in labels, or only in predictions."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    matrix = rng.integers(0, draw(st.sampled_from([1, 2, 10**4, 2**40])), (count, count))
    matrix[rng.random(count) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    matrix[:, rng.random(count) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    return matrix


def of_training(confusion):
    """As seg/metric.py and runtime/miou.py had it."""
    right, labels, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = right / (labels + predicted - right)
        acc = right / labels
    total, present, nan = int(labels.sum()), int((labels > 0).sum()), float("nan")
    return {
        "miou": float(np.nanmean(iou)) if total else nan,
        "macc": float(np.nanmean(acc)) if total else nan,
        "aacc": float(right.sum() / total) if total else nan,
        "class_iou": [float(v) for v in iou],
        "constant_miou": float(labels.max() / total / present) if total else nan,
    }


def of_intervals(right, labelled, predicted):
    """As bench/stats.py had it."""
    union = (labelled + predicted - right).astype(np.float64)
    occurs = union > 0
    iou = np.divide(right, union, out=np.zeros_like(union), where=occurs)
    count = occurs.sum(-1)
    return np.where(count > 0, iou.sum(-1) / np.maximum(count, 1), np.nan)


def of_the_demo(confusion):
    """As demo/report.py had it: a sum over the classes that occur only, so its last bit may differ from 8 on."""
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float((right[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


@settings(max_examples=200, deadline=None)
@given(matrices())
def test_every_number_is_what_it_was(confusion):
    counts = class_counts(confusion)
    assert confusion.dtype == np.int64
    np.testing.assert_equal(scores(*counts), of_training(confusion))
    np.testing.assert_array_equal(mean_iou(*counts), of_intervals(*counts))
    np.testing.assert_array_equal(mean_iou(*(c.astype(float) for c in counts)), of_intervals(*counts))
    assert (float(mean_iou(*counts)) if confusion.any() else 0.0) == pytest.approx(of_the_demo(confusion), rel=1e-15)
    if (confusion.any(0) | confusion.any(1)).all() or len(confusion) < 8:
        assert np.nan_to_num(mean_iou(*counts)) == of_the_demo(confusion)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12))
def test_many_draws_at_once(seed, draws, classes):
    """Leading dimensions are independent, as the bootstrap needs it."""
    rng = np.random.default_rng(seed)
    stack = rng.integers(0, 3, (draws, classes, classes)) * (rng.random((draws, classes, classes)) < 0.2)
    counts = [np.stack(c).astype(float) for c in zip(*map(class_counts, stack), strict=True)]
    np.testing.assert_array_equal(mean_iou(*counts), of_intervals(*counts))
    np.testing.assert_array_equal(mean_iou(*counts), [mean_iou(*class_counts(matrix)) for matrix in stack])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([np.uint8, np.int64]))
def test_against_counting_by_hand(seed, classes, kind):
    rng = np.random.default_rng(seed)
    label = rng.choice([*range(classes), 255], (7, 5)).astype(kind)
    prediction = rng.integers(0, classes, (7, 5)).astype(kind)
    matrix = confusion_matrix(label, prediction, classes, 255)
    assert matrix.dtype == np.int64
    for i in range(classes):
        for j in range(classes):
            assert matrix[i, j] == np.sum((label == i) & (prediction == j))
    union = [np.sum(((label == c) | (prediction == c)) & (label != 255)) for c in range(classes)]
    hits = [np.sum((label == c) & (prediction == c)) for c in range(classes)]
    np.testing.assert_array_equal(
        class_iou(*class_counts(matrix)), [h / u if u else np.nan for h, u in zip(hits, union, strict=True)]
    )


def test_what_is_ignored_and_what_is_wrong():
    label, prediction = np.array([[0, 1, 9]]), np.array([[0, 0, 1]])
    assert confusion_matrix(label, prediction, 2, 9).tolist() == [[1, 0], [1, 0]]
    assert confusion_matrix(label, prediction, 10, None)[9, 1] == 1
    assert confusion_matrix(np.full((2, 2), 255), np.full((2, 2), 77), 3, 255).sum() == 0  # ignored: anything may stand
    with pytest.raises(DataError, match="a label holds the class 9"):
        confusion_matrix(label, prediction, 2, 255)
    with pytest.raises(DataError, match=r"a\.onnx predicts the class 7"):
        confusion_matrix(label, prediction + 7 * (label == 0), 2, 9, "a.onnx")
    with pytest.raises(DataError, match="predicts the class -1"):
        confusion_matrix(label, prediction - 1, 2, 9)


def test_conventions():
    """A class that is only predicted counts as 0 in the mean IoU and not at all in the mean accuracy."""
    found = scores(*class_counts(np.array([[2, 1, 0], [0, 0, 0], [0, 0, 0]])))
    np.testing.assert_equal(found["class_iou"], [2 / 3, 0.0, float("nan")])
    assert found["miou"] == 1 / 3
    assert found["macc"] == found["aacc"] == 2 / 3
    assert found["constant_miou"] == 1.0
    empty = scores(*class_counts(np.zeros((2, 2), np.int64)))
    assert all(np.isnan(v) for v in (empty["miou"], empty["macc"], empty["aacc"], empty["constant_miou"]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_from_counts_of_ids_as_from_pixels(seed, classes):
    rng = np.random.default_rng(seed)
    label, guess = rng.choice([*range(classes), 255], (7, 5)), rng.integers(0, classes, (7, 5))
    order = rng.permutation(classes)
    counts = np.bincount((label * 256 + guess).ravel(), minlength=65536).reshape(256, 256)
    for told, wanted in ((None, guess), (order, order[guess])):
        matrix = matrix_of_ids(counts, classes, 255, order=told)
        np.testing.assert_array_equal(matrix, confusion_matrix(label, wanted, classes, 255))
    with pytest.raises(DataError, match="a label holds the class 255"):
        matrix_of_ids(counts + np.eye(256, dtype=np.int64)[::-1] * (np.arange(256) == 0), classes, None)
