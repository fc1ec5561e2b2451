"""Mean IoU: against counting by hand, int64, absent classes, constant prediction, every photo once."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymim.errors import CheckFailed
from tinymim.seg import SegMetric, SegResult


def sample(label, guess):
    return {"gt_sem_seg": {"data": torch.tensor(label)}, "pred_sem_seg": {"data": torch.tensor(guess)}}


def score(pairs, classes=3):
    metric = SegMetric()
    metric.dataset_meta = {"classes": [f"c{i}" for i in range(classes)]}
    metric.process({}, [sample(*pair) for pair in pairs])
    metric.evaluate(len(pairs))
    return metric.last


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), photos=st.integers(1, 3))
def test_against_counting_by_hand(seed, classes, photos):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(photos):
        size = rng.integers(1, 9, 2)
        label = rng.choice([*range(classes), 255], size)
        pairs.append((label[None], rng.integers(0, classes, size)[None]))
    label, guess = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in range(2))
    label, guess = label[label != 255], guess[label != 255]
    if not len(label):
        return
    found = score(pairs, classes)
    union = [np.sum((label == c) | (guess == c)) for c in range(classes)]
    iou = [np.sum((label == c) & (guess == c)) / u if u else np.nan for c, u in enumerate(union)]
    np.testing.assert_allclose(found.class_iou, iou)
    assert found.miou == pytest.approx(np.nanmean(iou))
    assert found.aacc == pytest.approx(np.mean(label == guess))
    assert found.macc == pytest.approx(np.mean([np.mean(guess[label == c] == c) for c in np.unique(label)]))
    constants = []
    for c in range(classes):
        ious = [np.sum(label == c) / len(label) if d == c else 0.0 for d in {*np.unique(label).tolist(), c}]
        constants.append(np.mean(ious))
    assert found.constant_miou == pytest.approx(max(constants))
    assert found.images == photos


def test_agrees_with_mmseg():
    from mmseg.evaluation import IoUMetric

    rng = np.random.default_rng(0)
    pairs = [(rng.choice([0, 1, 2, 255], (1, 20, 30)), rng.integers(0, 3, (1, 20, 30))) for _ in range(3)]
    theirs = IoUMetric()
    theirs.dataset_meta = {"classes": ["a", "b", "c"]}
    theirs.process({}, [sample(*pair) for pair in pairs])
    wanted, ours = theirs.evaluate(3), score(pairs)
    for name, value in (("mIoU", ours.miou), ("mAcc", ours.macc), ("aAcc", ours.aacc)):
        assert round(100 * value, 2) == wanted[name]


def test_counts_are_exact_beyond_float32():
    confusion = np.zeros((2, 2), np.int64)
    confusion[0, 0], confusion[1, 1], confusion[0, 1] = 2**40, 2**40, 1
    result = SegResult.from_confusion(confusion, ["a", "b"], 1)
    assert result.class_iou[0] == 2**40 / (2**40 + 1)


def test_a_photo_counted_twice_is_an_error():
    metric = SegMetric()
    metric.dataset_meta = {"classes": ["a", "b"]}
    metric.process({}, [sample([[[0]]], [[[0]]])] * 2)
    with pytest.raises(CheckFailed, match="2 photos of 1"):
        metric.evaluate(1)


def test_json_and_markdown(tmp_path):
    result = score([([[[0, 1, 255]]], [[[0, 0, 0]]])])
    told = json.loads(result.to_json(tmp_path / "r.json"))
    assert told == json.loads((tmp_path / "r.json").read_text())
    assert told["class_IoU"] == {"c0": 0.5, "c1": 0.0, "c2": None}
    assert told["mIoU"] == 0.25
    assert "| c2 | absent |" in result.to_markdown(tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text().startswith("mIoU 25.00 %")
