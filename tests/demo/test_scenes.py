"""Drawn scenes and shrunken folders: same seed same bytes, readable as ADE20K layout, every class there."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim.data.folders import IGNORED, read_layout
from tinymim.demo.scenes import CLASSES, PALETTE, draw_scene, write_scenes
from tinymim.demo.shrink import shrink_layout
from tinymim.errors import DataError


def digest(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, train=3, val=2, size=(96, 64), seed=seed)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert len(a) == 2 * 5 + 1
    assert a == b
    same = [name for name in a if a[name] == c[name]]
    assert same == ["dataset.json"]


def test_splits_differ(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=2, val=2, size=(96, 64))
    photos = [p.read_bytes() for p in sorted(tmp_path.rglob("*.jpg"))]
    assert len(set(photos)) == 4


def test_the_folder_is_a_valid_layout(tmp_path: Path) -> None:
    layout = read_layout(write_scenes(tmp_path, train=4, val=2, size=(97, 65)))
    assert layout.source == "dataset.json"
    assert (layout.classes, layout.palette) == (CLASSES, PALETTE)
    assert (len(layout.train), len(layout.val)) == (4, 2)
    for photo, label in [*layout.train, *layout.val]:
        assert Image.open(photo).size == (97, 65)
        ids = layout.read_label(label)
        assert ids.shape == (65, 97)
        assert ids.max() < len(CLASSES)


def test_every_class_is_drawn_and_none_rules() -> None:
    """A constant prediction must score low, and no class may be too rare to be learned."""
    counts = np.zeros(len(CLASSES))
    for i in range(60):
        photo, label = draw_scene(96, 80, np.random.default_rng((0, 0, i)))
        assert photo.shape == (80, 96, 3)
        assert photo.std() > 10
        counts += np.bincount(label.ravel(), minlength=len(CLASSES))
    share = counts / counts.sum()
    assert share.min() > 0.008, dict(zip(CLASSES, share.round(4), strict=True))
    assert share.max() / len(CLASSES) < 0.04  # mIoU of the best constant prediction


def test_colour_alone_does_not_tell_the_class() -> None:
    """The best guess from a pixel's colour (64 bins, counted on the same pixels) stays well below a right answer."""
    joint = np.zeros((64, len(CLASSES)))
    for i in range(40):
        photo, label = draw_scene(96, 80, np.random.default_rng((1, 0, i)))
        bins = (photo // 64).astype(int) @ (16, 4, 1)
        np.add.at(joint, (bins.ravel(), label.ravel()), 1)
    best = joint.argmax(1)
    hits = np.array([joint[best == k, k].sum() for k in range(len(CLASSES))])
    union = joint.sum(0) + np.array([joint[best == k].sum() for k in range(len(CLASSES))]) - hits
    assert (hits / union).mean() < 0.35


@pytest.mark.parametrize("wrong", [dict(train=0), dict(val=0), dict(size=(16, 64))])
def test_sizes_that_make_no_sense(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(DataError, match="cannot draw"):
        write_scenes(tmp_path, **({"train": 1, "val": 1} | wrong))


def test_shrunken_copy_keeps_labels_on_their_pixels(tmp_path: Path) -> None:
    """A wide photo is cut around its centre; ids are turned into training ids; a damaged photo is left out."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "big" / kind / split).mkdir(parents=True)
        for name in "xy":
            label = np.full((80, 200), 2, np.uint8)  # 2 left and right, 1 in the middle, 0 (ignored) at the very top
            label[:, 60:140] = 1
            label[:8] = 0
            photo = np.stack([label * 100] * 3, -1)
            Image.fromarray(photo).save(tmp_path / "big" / "images" / split / f"{name}.png")
            Image.fromarray(label).save(tmp_path / "big" / "annotations" / split / f"{name}.png")
    (tmp_path / "big" / "images" / "training" / "x.png").write_bytes(b"no photo")
    layout = read_layout(tmp_path / "big", reduce_zero_label=True)
    written = shrink_layout(layout, tmp_path / "small", train=5, val=1, size=(50, 40))
    assert written == {"train": 1, "val": 1}
    small = read_layout(tmp_path / "small")
    assert small.classes == layout.classes
    photo, label = small.train[0]
    ids = small.read_label(label)
    assert ids.shape == (40, 50)
    assert (ids[:4] == IGNORED).all()
    assert (ids[5:, 6:44] == 0).all()  # 100 of 200 columns are kept: 60..140 of 50..150 is 5..45 of 50
    assert (ids[5:, [0, 1, 2, 47, 48, 49]] == 1).all()
    grey = np.asarray(Image.open(photo).convert("L")).astype(int)
    assert abs(grey[20, 25] - 100) < 12
    assert abs(grey[20, 1] - 200) < 12


def test_shrinking_needs_a_readable_photo(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", train=1, val=1, size=(64, 64))
    layout = read_layout(tmp_path / "a")
    next((tmp_path / "a" / "images" / "training").iterdir()).write_bytes(b"")
    with pytest.raises(DataError, match="can be read"):
        shrink_layout(layout, tmp_path / "b", train=1, val=1, size=(32, 32))
