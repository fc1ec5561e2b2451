"""Labelled folders: what the ids mean, and every way a folder can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim.data.folders import read_layout
from tinymim.errors import DataError


def make(root: Path, labels: dict[str, np.ndarray], meta=None, name="p{}") -> Path:
    """A folder with one photo a label: ``labels`` maps split -> (n, H, W) ids."""
    for split, ids in labels.items():
        for i, label in enumerate(ids):
            for kind, array, suffix in (
                ("images", np.zeros((*label.shape, 3), np.uint8), "jpg"),
                ("annotations", label, "png"),
            ):
                path = root / kind / split / f"{name.format(i)}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    if meta is not None:
        (root / "dataset.json").write_text(json.dumps(meta))
    return root


def ids(*rows) -> np.ndarray:
    return np.array([rows], np.uint8).reshape(1, 1, -1)


BOTH = {"training": ids(0, 1, 2, 7), "validation": ids(3, 0, 255, 7)}


def test_dataset_json_decides(tmp_path):
    meta = {"classes": ["a", "b", "c", "d"], "ignore": [7], "zero_is_ignored": False}
    layout = read_layout(make(tmp_path, BOTH, meta))
    assert layout.source == "dataset.json"
    assert layout.classes == ("a", "b", "c", "d")
    assert len(set(layout.palette)) == 4
    assert layout.read_label(layout.train[0][1]).tolist() == [[0, 1, 2, 255]]
    assert layout.read_label(layout.val[0][1]).tolist() == [[3, 0, 255, 255]]


def test_zero_is_ignored_shifts_the_classes(tmp_path):
    meta = {"classes": ["a", "b", "c"], "ignore": [7], "zero_is_ignored": True, "palette": [[1, 2, 3]] * 3}
    layout = read_layout(make(tmp_path, BOTH, meta))
    assert layout.read_label(layout.train[0][1]).tolist() == [[255, 0, 1, 255]]
    assert layout.palette == ((1, 2, 3),) * 3


def test_options_without_dataset_json(tmp_path):
    make(tmp_path, BOTH)
    layout = read_layout(tmp_path, ignore_label=7)
    assert (layout.source, len(layout.classes), layout.zero_is_ignored) == ("options", 4, False)
    layout = read_layout(tmp_path, ignore_label=[7], reduce_zero_label=True)
    assert (len(layout.classes), layout.zero_is_ignored) == (3, True)
    assert layout.read_label(layout.train[0][1]).tolist() == [[255, 0, 1, 255]]


def test_scan_counts_the_ids_and_says_so(tmp_path):
    layout = read_layout(make(tmp_path, BOTH))
    assert (layout.source, len(layout.classes)) == ("scan", 8)
    assert "a scan of all labels" in str(layout)
    assert "8 classes" in str(layout)


def test_ade20k_is_known_by_its_names(tmp_path):
    layout = read_layout(make(tmp_path, {"validation": ids(0, 1, 150)}, name="ADE_val_0000000{}"))
    assert (layout.source, len(layout.classes)) == ("ade20k", 150)
    assert (layout.classes[0], layout.classes[149]) == ("wall", "flag")
    assert layout.read_label(layout.val[0][1]).tolist() == [[255, 0, 149]]
    assert layout.train == []


def test_ade20k_sample(shared):
    """Real files: the ids its README lists, shifted down by one."""
    layout = read_layout(shared / "data" / "ade20k-sample")
    seen = [set(np.unique(layout.read_label(label)).tolist()) - {255} for _, label in layout.val]
    assert seen[0] == {i - 1 for i in (1, 2, 3, 5, 7, 10, 18)}
    assert seen[2] == {i - 1 for i in (1, 2, 3, 5, 7, 12, 21, 44, 81, 88, 97, 103)}
    assert layout.classes[20] == "car"


def test_camvid(shared):
    layout = read_layout(shared / "data" / "camvid")
    assert (len(layout.train), len(layout.val), len(layout.classes)) == (367, 101, 11)
    assert layout.classes[8] == "Car"
    assert layout.palette[8] == (64, 0, 128)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("{", "not valid JSON"),
        ({}, "classes"),
        ({"classes": ["a"], "palette": [[0, 0]]}, "palette"),
        ({"classes": ["a"], "palette": [[0, 0, 256]]}, "palette"),
        ({"classes": ["a"], "ignore": 3}, "ignore"),
        ({"classes": ["a"], "zero_is_ignored": 1}, "zero_is_ignored"),
        ({"classes": ["a"], "ignored": [3]}, "ignored"),
        ({"classes": [str(i) for i in range(255)]}, "255 classes"),
    ],
)
def test_bad_dataset_json(tmp_path, meta, words):
    make(tmp_path, BOTH)
    (tmp_path / "dataset.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    with pytest.raises(DataError, match=words):
        read_layout(tmp_path)


def test_options_that_contradict_dataset_json(tmp_path):
    make(tmp_path, BOTH, {"classes": list("abcd"), "ignore": [7]})
    assert read_layout(tmp_path, ignore_label=7, reduce_zero_label=False).source == "dataset.json"
    for options in (dict(ignore_label=2), dict(reduce_zero_label=True)):
        with pytest.raises(DataError, match="contradict"):
            read_layout(tmp_path, **options)


def test_an_id_without_class_names_the_file(tmp_path):
    make(tmp_path, BOTH, {"classes": list("abcd")})
    with pytest.raises(DataError, match=r"p0\.png holds the label id 7.*\n.*go up to 3") as caught:
        read_layout(tmp_path)
    assert "--ignore-label 7" in str(caught.value)


def test_ids_above_255_and_coloured_labels(tmp_path):
    make(tmp_path, {"training": ids(0, 1)}, {"classes": list("ab")})
    path = tmp_path / "annotations" / "training" / "p0.png"
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(path)
    with pytest.raises(DataError, match="label id 300"):
        read_layout(tmp_path)
    Image.fromarray(np.zeros((1, 2, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match="is not a label map"):
        read_layout(tmp_path)


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        read_layout(tmp_path / "absent")
    with pytest.raises(DataError, match="is not a labelled folder"):
        read_layout(tmp_path)
    make(tmp_path / "inner", BOTH)
    with pytest.raises(DataError, match="inner has that layout"):
        read_layout(tmp_path)
    (tmp_path / "empty" / "images" / "training").mkdir(parents=True)
    with pytest.raises(DataError, match="no photos"):
        read_layout(tmp_path / "empty")
    (tmp_path / "inner" / "annotations" / "validation" / "p0.png").unlink()
    with pytest.raises(DataError, match=r"1 of 1 photos .* have no label, the first is p0\.jpg"):
        read_layout(tmp_path / "inner")


def test_one_split_only(tmp_path):
    layout = read_layout(make(tmp_path, {"validation": ids(0, 1)}))
    assert len(layout.need("val")) == 1
    with pytest.raises(DataError, match=r"no photos in .*images/training"):
        layout.need("train")


def test_labels_with_every_pixel_ignored(tmp_path):
    with pytest.raises(DataError, match="cannot be counted"):
        read_layout(make(tmp_path, {"training": ids(255, 255)}))
