"""Calibration: which photos, refusals, the very pixels of inference, ranges that mean what they say."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tests.export.photographs import write_photos
from tinymim.errors import ConfigError, DataError
from tinymim.files import sha256_file
from tinymim_export.precision.calibrate import Histogram, NetworkInputs, choose_photos, measure
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import load_proto, write_metadata
from tinymim_export.runtime.predictor import Predictor, read_photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 6)


def test_choice_is_seeded_and_recorded(photos):
    first, again, other = choose_photos(photos, 4, 0), choose_photos(photos, 4, 0), choose_photos(photos, 4, 1)
    assert first.photos == again.photos
    assert first.photos != other.photos
    assert len(first.photos) == 4
    assert len(first.spare) == 2
    about = first.about("minmax")
    assert (about["folder"], about["count"], about["seed"], about["method"]) == (photos.name, 4, 0, "minmax")
    assert about["files"] == [[p.name, sha256_file(p)[:16]] for p in first.photos]
    assert about["list_sha256"] != other.about("minmax")["list_sha256"]
    json.dumps(about)


def test_labelled_folder_gives_its_training_photos(photos, tmp_path):
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
    for i, photo in enumerate(sorted(photos.iterdir())):
        shutil.copy(photo, tmp_path / "images" / ("training" if i < 4 else "validation") / photo.name)
        Image.new("L", (8, 8), i).save(tmp_path / "annotations" / "training" / f"{photo.stem}.png")
    chosen = choose_photos(tmp_path, 4)
    assert {p.parent.name for p in chosen.photos} == {"training"}
    assert all(name.startswith("images/training/") for name, _ in chosen.files)
    assert chosen.spare == []


def _grey(folder):
    Image.new("RGB", (40, 30), (128, 128, 128)).save(folder / "grey.png")


def _greys(folder):
    for i in range(4):
        Image.new("L", (40, 30), 40 * i).save(folder / f"{i}.png")


def _masks(folder):
    for i in range(4):
        ids = np.random.default_rng(i).integers(0, 9, (6, 8)).astype(np.uint8)
        Image.fromarray(ids.repeat(10, 0).repeat(10, 1)).save(folder / f"{i}.png")


def _copies(folder):
    write_photos(folder, 1)
    for i in range(3):
        shutil.copy(folder / "0.png", folder / f"copy{i}.png")


def _broken(folder):
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(b"no photo")


@pytest.mark.parametrize(
    ("make", "count", "words"),
    [
        (lambda folder: folder.rmdir(), 4, "no folder"),
        (lambda folder: (folder / "text.txt").write_text("x"), 4, "no calibration photos"),
        (lambda folder: write_photos(folder, 3), 4, "--calibration-count 3"),
        (_broken, 4, "0 of its 4 pictures can be read"),
        (_grey, 1, "only picture is of one colour"),
        (_greys, 4, "without any variation"),
        (_masks, 4, "as masks, labels and drawings have"),
        (_copies, 4, "the same picture"),
    ],
)
def test_useless_sets_are_refused(tmp_path, make, count, words):
    folder = tmp_path / "photos"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match=words):
        choose_photos(folder, count)


def test_count_must_be_a_count(photos):
    with pytest.raises(ConfigError, match="counts photos"):
        choose_photos(photos, 0)


def test_an_unreadable_photo_is_replaced_and_named(photos, tmp_path, capsys):
    for photo in photos.iterdir():
        shutil.copy(photo, tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    chosen = choose_photos(tmp_path, 6)
    assert len(chosen.photos) == 6
    assert "bad.jpg" not in [name for name, _ in chosen.files]
    assert "skipped bad.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rule",
    [
        {"scale": [150, 80], "keep_ratio": True, "mode": "slide", "crop": [64, 96], "slide_stride": [42, 64]},
        {"scale": [96, 64], "keep_ratio": False, "mode": "whole"},
    ],
)
def test_inputs_are_those_of_inference(exported, photos, tmp_path, rule, monkeypatch):
    path = tmp_path / "model.onnx"
    proto = load_proto(exported.fixed.onnx)
    write_metadata(proto, {"resize": rule})
    path.write_bytes(proto.SerializeToString())
    photo = next(photos.iterdir())
    predictor, seen = Predictor(path), []
    run = predictor.engine.run
    monkeypatch.setattr(predictor.engine, "run", lambda images: seen.append(images.copy()) or run(images))
    predictor.mask(read_photo(photo))
    inputs = NetworkInputs(open_engine(path))
    got = [inputs(photo, seed) for seed in range(20)]
    assert all(any(np.array_equal(a, b) for b in seen) for a in got)
    assert (len({a.tobytes() for a in got}) > 1) == (len(seen) > 1) == (rule["mode"] == "slide")
    assert inputs.notes == []


def test_photos_are_stretched_where_the_file_fits_no_other_way(exported, photos, tmp_path):
    proto = load_proto(exported.fixed.onnx)
    write_metadata(proto, {"resize": {"scale": [300, 200], "keep_ratio": True, "mode": "whole"}})
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    inputs = NetworkInputs(open_engine(tmp_path / "model.onnx"))
    assert inputs(next(photos.iterdir())).shape == (1, 3, 64, 96)
    assert "stretched to 64x96" in inputs.notes[0]


def test_a_file_without_normalisation_says_so(exported, tmp_path):
    proto = load_proto(exported.fixed.onnx)
    del proto.metadata_props[:]
    (tmp_path / "foreign.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match="does not say how photos are normalised"):
        NetworkInputs(open_engine(tmp_path / "foreign.onnx"))


numbers = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays(np.float32, st.integers(1, 60), elements=numbers), min_size=1, max_size=4))
@example([np.array([1.8497733e-08], np.float32)])  # next to an edge of the counts
def test_ranges_lie_inside_what_was_seen(batches):
    histogram = Histogram()
    for values in batches:
        histogram.add(values)
    everything = np.concatenate(batches)
    assert histogram.range("minmax") == (everything.min(), everything.max())
    assert histogram.counts.sum() == everything.size
    for method in ("percentile", "entropy"):
        low, high = histogram.range(method)
        assert everything.min() <= low <= max(high, 0)
        assert min(low, 0) <= high <= everything.max()


@pytest.mark.parametrize("values", [(5, 9), (3, 4), (0.1, 1), (-9, -5)])
def test_values_of_one_sign_keep_their_range(values):
    histogram = Histogram()
    histogram.add(np.random.default_rng(0).uniform(*values, 20_000).astype(np.float32))
    for method in ("percentile", "entropy"):
        np.testing.assert_allclose(histogram.range(method), values, atol=0.01)


def test_percentile_is_numpys_and_forgets_outliers():
    values = np.random.default_rng(0).standard_normal(90_000).astype(np.float32)
    histogram = Histogram()
    for part in np.split(values, 9):
        histogram.add(part)
    low, high = histogram.range("percentile")
    np.testing.assert_allclose([low, high], np.percentile(values, [0.005, 99.995]), atol=0.3)
    histogram.add(np.array([1000.0], np.float32))
    assert histogram.range("minmax")[1] == 1000
    assert histogram.range("percentile")[1] < 10
    assert histogram.range("entropy")[1] < 1000


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="infinite or NaN"):
        Histogram().add(np.array([1, np.nan], np.float32))


def test_measure_sees_inner_tensors_and_the_image(exported):
    images = [np.random.default_rng(i).standard_normal((1, 3, 64, 96)).astype(np.float32) for i in range(2)]
    found = measure(load_proto(exported.fixed.onnx), ["image", "tap0", "logits"], iter(images), 2, quiet=True)
    assert found["image"].range("minmax") == (min(x.min() for x in images), max(x.max() for x in images))
    assert found["tap0"].counts.sum() == 2 * 24 * 4 * 6
