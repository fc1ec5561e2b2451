"""Boxes by their properties, and the scores of one-pass evaluation against values computed by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinymim.errors import ConfigError
from tinymim.track import FirstBox, TemplateMatcher, evaluate_tracker, follow
from tinymim.track.boxes import Square, centres, corners, from_corners, inside, overlap, square_around
from tinymim.track.metrics import AT, Curves, curves, mean_curves
from tinymim.track.sequences import Sequence

place, side = st.floats(-500, 500), st.floats(0.5, 400)
boxes = st.tuples(place, place, side, side).map(np.array)


@given(boxes, boxes)
@settings(max_examples=60, deadline=None)
def test_conversions_and_overlap(a, b):
    assert from_corners(corners(a)) == pytest.approx(a)
    assert overlap(a, b) == pytest.approx(overlap(b, a))
    assert 0 <= overlap(a, b) <= 1
    assert overlap(a, a) == pytest.approx(1)
    assert overlap(a + np.array([1000, 0, 0, 0]), a) == 0
    square = square_around(a, 4)
    assert square.side >= 2
    assert square.to_frame(square.to_crop(b)) == pytest.approx(b, abs=1e-6)
    assert square.to_crop(a)[:2] == pytest.approx([0.5, 0.5])


@given(boxes, st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_a_followed_box_stays_in_the_frame(box, width, height):
    x, y, w, h = inside(box, (width, height))
    assert x >= -1e-9
    assert x + w <= width + 1e-9
    assert y >= -1e-9
    assert y + h <= height + 1e-9
    assert w >= min(10, width) - 1e-9
    assert h >= min(10, height) - 1e-9


def test_overlap_by_hand():
    a, b = np.array([0.0, 0, 10, 10]), np.array([5.0, 0, 10, 10])
    assert overlap(a, b) == pytest.approx(50 / 150)
    assert overlap(np.zeros(4), np.zeros(4)) == 0


def test_a_crop_holds_the_pixels_of_its_square():
    """A red target in a grey frame, cut at the border: red where its box is, black beyond the frame."""
    frame = Image.new("RGB", (60, 40), (90, 90, 90))
    frame.paste((255, 0, 0), (0, 10, 20, 30))
    square = Square(-20, 0, 40)  # half of it lies outside
    crop = np.asarray(square.cut(frame, 80))
    cx, cy, w, h = square.to_crop(np.array([0.0, 10, 20, 20])) * 80
    red = crop[int(cy - h / 2) + 2 : int(cy + h / 2) - 2, int(cx - w / 2) + 2 : int(cx + w / 2) - 2]
    assert (red == (255, 0, 0)).all()
    assert (crop[:, :40] == 0).all()
    assert (crop[:15, 42:] == 90).all()
    assert (np.asarray(Square(200, 200, 10).cut(frame, 16)) == 0).all()


def test_scores_by_hand():
    """Four frames: exact, half overlapped and 10 pixels off, far off, absent."""
    truth = np.array([[0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 0, 0]], float)
    predicted = np.array([[0, 0, 20, 20], [10, 0, 20, 20], [100, 0, 20, 20], [0, 0, 20, 20]], float)
    found = curves(predicted, truth, np.array([True, True, True, False]))
    # overlaps 1, 1/3, 0, absent: above 0 .. 0.3 two of four, above 0.35 .. 0.95 one, above 1 none
    assert found.success.tolist() == [0.5] * 7 + [0.25] * 13 + [0.0]
    assert found.scores["auc"] == pytest.approx((7 * 0.5 + 13 * 0.25) / 21)
    assert found.precision[9] == 0.25
    assert found.precision[10] == found.scores["precision"] == 0.5  # 0 and 10 pixels are within 20
    assert found.normalised[AT] == 0.25  # half the target's width is more than 0.2
    assert found.normalised[50] == 0.5
    perfect = curves(truth[:3], truth[:3], np.ones(3, bool))
    assert perfect.scores == {"auc": pytest.approx(20 / 21), "precision": 1.0, "normalised_precision": 1.0}
    both = mean_curves([found, perfect])
    assert isinstance(both, Curves)
    assert both.scores["precision"] == pytest.approx(0.75)  # sequences weigh the same


@pytest.fixture
def moving(tmp_path):
    """A noisy square that moves 3 pixels a frame over other noise: exact matching finds it."""
    rng = np.random.default_rng(0)
    back, target = rng.integers(0, 256, (60, 90, 3), np.uint8), rng.integers(0, 256, (12, 16, 3), np.uint8)
    frames = []
    for i in range(8):
        pixels = back.copy()
        pixels[20:32, 10 + 3 * i : 26 + 3 * i] = target
        frames.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(frames[-1])
    truth = np.array([[10 + 3 * i, 20, 16, 12] for i in range(8)], float)
    return Sequence("moving", frames, (90, 60), truth, np.ones(8, bool))


def test_the_template_matcher_follows_what_does_not_change(moving):
    exact, still = evaluate_tracker(TemplateMatcher(), [moving]), evaluate_tracker(FirstBox(), [moving])
    assert exact.auc == pytest.approx(20 / 21)
    assert still.auc < 0.4
    value = json.loads(exact.to_json())
    assert value["sequences"][0] == {"name": "moving", "frames": 8, **curves(moving.truth, *_of(moving)).scores}


def _of(sequence):
    return sequence.truth, sequence.visible


def test_following_writes_boxes_and_pictures(moving, tmp_path):
    photos = [Image.open(path) for path in moving.frames]
    result = follow(
        TemplateMatcher(), photos, [10, 20, 16, 12], tmp_path / "out", source="moving", total=8, pictures=True
    )
    lines = (tmp_path / "out/boxes.txt").read_text().split()
    assert lines == [",".join(f"{v:.2f}" for v in box) for box in moving.truth]
    assert json.loads((tmp_path / "out/boxes.json").read_text())["boxes"] == result.boxes == moving.truth.tolist()
    drawn = np.asarray(Image.open(tmp_path / "out/pictures/00000008.jpg"), int)
    assert abs(drawn[20, 40] - [255, 64, 32]).max() < 90  # the box's upper edge
    with pytest.raises(ConfigError, match="exists"):
        follow(TemplateMatcher(), photos, [10, 20, 16, 12], tmp_path / "out", source="moving")
    for box in ([10, 20, 0, 12], [10, 20, float("nan"), 12], [200, 20, 16, 12]):
        with pytest.raises(ConfigError, match="--box"):
            follow(FirstBox(), photos, box, tmp_path / "none", source="moving")
    from tinymim.errors import DataError

    with pytest.raises(DataError, match="ends early"):
        follow(FirstBox(), photos[:5], [10, 20, 16, 12], tmp_path / "none", source="moving", total=8)
    with pytest.raises(DataError, match="different sizes"):
        follow(FirstBox(), [photos[0], photos[1].resize((50, 50))], [10, 20, 16, 12], tmp_path / "none", source="m")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]
    assert not list(tmp_path.glob(".*"))


def test_plain_and_small_templates(tmp_path):
    """A one-coloured target, one at the border, one as large as the frame: a box in the frame each time."""
    frame = Image.new("RGB", (40, 30), (50, 60, 70))
    for box in ([5, 5, 8, 8], [38, 28, 2, 2], [0, 0, 40, 30]):
        matcher = TemplateMatcher()
        matcher.start(frame, np.array(box, float))
        found, _ = matcher.step(frame)
        assert np.isfinite(found).all()
        assert (centres(found) >= 0).all()
        assert (centres(found) <= frame.size).all()
