"""Segmentation scores from pixel counts: one confusion matrix, one IoU, one mean. numpy only, so it runs anywhere.

Conventions, the same for training, files, intervals and the demo: rows of a matrix are labels, columns predictions;
ignored pixels are left out of all counts. A class counts in the mean IoU if it occurs in the labels or in the
predictions, and in the mean accuracy if it occurs in the labels; elsewhere its score is NaN. Where no pixel is
labelled, every mean is NaN. These are MMSegmentation's (``mmseg/evaluation/metrics/iou_metric.py``), in exact int64.

Suffixes: C classes.
"""

from typing import Any

import numpy as np

from tinymim.errors import DataError


def confusion_matrix(
    label: np.ndarray, prediction: np.ndarray, classes: int, ignore: int | None, name: str = "the model"
) -> np.ndarray:
    """Count the pixels of a photo.

    Args:
        label: Class of every pixel, from 0; integers of any shape.
        prediction: Predicted class of every pixel, same shape.
        classes: Number of classes.
        ignore: Label of pixels that do not count; None: all count.
        name: What made the prediction, for the error.

    Returns:
        int64 (classes, classes), rows = label, columns = prediction.

    Raises:
        DataError: a label or a prediction outside the classes.
    """
    counted = np.full(label.shape, True) if ignore is None else label != ignore
    labelled, predicted = label[counted].astype(np.int64), prediction[counted].astype(np.int64)
    _check_classes(labelled, predicted, classes, name)
    return np.bincount(labelled * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def matrix_of_ids(
    counts: np.ndarray, classes: int, ignore: int | None, name: str = "the model", order: np.ndarray | None = None
) -> np.ndarray:
    """The matrix of :func:`confusion_matrix` from the counts of all pairs of ids, which a device makes in one pass.

    Args:
        counts: int64 (ids, ids), rows = label, columns = predicted id.
        classes: Number of classes.
        ignore: Label of pixels that do not count; None: all count.
        name: What made the prediction, for the error.
        order: (ids,) class of every predicted id; None: the ids are the classes.

    Raises:
        DataError: a label or a prediction outside the classes.
    """
    labelled, predicted = np.nonzero(counts)
    counted = labelled != ignore
    labelled, predicted = labelled[counted], predicted[counted]
    found = predicted if order is None else order[predicted]
    _check_classes(labelled, found, classes, name)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labelled, found), counts[labelled, predicted])
    return matrix


def _check_classes(labelled: np.ndarray, predicted: np.ndarray, classes: int, name: str) -> None:
    for who, found, advice in (
        (f"{name} predicts", predicted, "score it on the data it was trained for"),
        ("a label holds", labelled, "list ids that are not classes in dataset.json, or with --ignore-label ID"),
    ):
        if found.size and not 0 <= found.min() <= found.max() < classes:
            wrong = found.max() if found.max() >= classes else found.min()
            raise DataError(
                f"{who} the class {wrong}", f"the folder has {classes} classes (0 to {classes - 1})", advice
            )


def class_counts(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correct, labelled and predicted pixels of each class, (C,) each, from a (C, C) matrix."""
    return confusion.diagonal(), confusion.sum(1), confusion.sum(0)


def class_iou(right: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Intersection over union of every class.

    Args:
        right: (..., C) pixels labelled and predicted as the class.
        labelled: (..., C) pixels labelled as the class.
        predicted: (..., C) labelled pixels predicted as the class.

    Returns:
        (..., C) fractions from 0 to 1; NaN for a class that occurs in neither.
    """
    return _share(right, labelled + predicted - right)


def mean_iou(right: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes that occur in labels or predictions; arguments as for :func:`class_iou`.

    Returns:
        (...), fractions from 0 to 1; NaN where no class occurs.
    """
    return _mean_of_known(class_iou(right, labelled, predicted))


def scores(right_C: np.ndarray, labelled_C: np.ndarray, predicted_C: np.ndarray) -> dict[str, Any]:
    """All scores of a dataset from its :func:`class_counts`.

    Returns:
        Fractions from 0 to 1: ``miou``; ``macc``, the mean share of correct pixels of the labelled classes; ``aacc``,
        the share of correct pixels; ``class_iou``, a list; ``constant_miou``, the mIoU of the best constant prediction.
        They are NaN if no pixel is labelled.
    """
    total, present = int(labelled_C.sum()), int((labelled_C > 0).sum())
    iou = class_iou(right_C, labelled_C, predicted_C)
    return {
        "miou": float(_mean_of_known(iou)) if total else float("nan"),
        "macc": float(_mean_of_known(_share(right_C, labelled_C))),
        "aacc": float(right_C.sum() / total) if total else float("nan"),
        "class_iou": [float(v) for v in iou],
        "constant_miou": float(labelled_C.max() / total / present) if total else float("nan"),
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN if all values are NaN."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, values, 0.0).sum(-1) / np.maximum(count, 1), np.nan)
