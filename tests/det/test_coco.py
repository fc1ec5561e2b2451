"""COCO's format: what is read, what is refused, and the crops with their objects."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.det.scenes import write_coco
from tinymim.det.coco import CocoPhotos, open_labelled, read_coco, run_lengths, tools
from tinymim.errors import DataError


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "set", 4), tmp_path / "set" / "photos"


def changed(file, change):
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_classes_follow_the_ids(coco):
    """Category ids need not be consecutive, nor in order."""
    data = read_coco(*coco)
    assert data.classes == ["circle", "square"]
    assert data.categories == {3: 1, 7: 2}
    assert len(data.items) == 4
    assert data.with_masks
    assert "4 photos" in str(data)


def test_masks_of_polygons_and_of_run_lengths_are_the_same(coco):
    """Compressed and plain run lengths, too."""
    item = read_coco(*coco).items[0]
    whole = tools().decode(run_lengths(item.shapes[0], item.size))
    left, top, right, bottom = map(round, item.boxes[0])
    assert whole[top:bottom, left:right].mean() > 0.7
    assert whole.sum() == whole[top:bottom, left:right].sum()
    packed = run_lengths(item.shapes[0], item.size)
    flat = whole.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    counts = counts if not flat[0] else [0, *counts]
    for shape in ({**packed, "counts": packed["counts"].decode()}, {"size": [*item.size], "counts": counts}):
        assert np.array_equal(tools().decode(run_lengths(shape, item.size)), whole)
    with pytest.raises(DataError, match="run lengths of"):
        run_lengths({"size": [3, 4], "counts": [12]}, item.size)


@pytest.mark.parametrize("scale", [(0.3, 0.3), (1.0, 1.0), (2.0, 2.0)])
def test_boxes_follow_their_masks(coco, scale):
    """Scaled, cropped, padded and mirrored alike; the crop is the same for the same key."""
    data = CocoPhotos(read_coco(*coco).items, size=128, scale=scale, seed=3)
    for key in [(0, 0), (0, 1), (1, 1), (2, 3)]:
        item = data[key]
        boxes, masks = item["target"]["boxes"], item["target"]["masks"]
        assert item["image"].shape == (3, 128, 128)
        assert masks.shape == (len(boxes), 128, 128)
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = np.nonzero(mask.numpy())
            found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            torch.testing.assert_close(found, box)
        again = data[key]
        assert torch.equal(again["image"], item["image"])
        assert torch.equal(again["target"]["boxes"], boxes)


def test_photos_without_objects_teach_nothing_and_are_scored(coco):
    """So are crowds; empty photos stay among the items."""
    file, photos = coco

    def change(content):
        content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 10]
        for note in content["annotations"]:
            note["iscrowd"] = int(note["image_id"] == 20)

    changed(file, change)
    data = read_coco(file, photos)
    assert len(data.items) == 4
    assert len(CocoPhotos(data.items, size=64)) == 2


def test_a_turned_photo_is_seen_as_its_labels_see_it(coco):
    """EXIF orientation: annotations of COCO are of the pixels as stored."""
    file, photos = coco
    turned = Image.open(photos / "000.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(photos / "000.jpg", exif=exif)
    changed(file, lambda content: content["images"][0].update(file_name="000.jpg"))
    photo = open_labelled(read_coco(file, photos).items[0])
    assert photo.size == (128, 96)
    changed(file, lambda content: content["images"][0].update(width=70))
    with pytest.raises(DataError, match="annotations say"):
        open_labelled(read_coco(file, photos).items[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(images=[]), "has no images"),
        (lambda c: c.pop("images"), "'images' is no list"),
        (lambda c: c["images"][0].update(file_name="../secret.png"), "file_name='../secret.png'"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "file_name='/etc/passwd'"),
        (lambda c: c["images"][0].update(width=0), "height and width"),
        (lambda c: c["images"][0].update(file_name="none.png"), "1 of 4 photos"),
        (lambda c: c["images"][1].update(id=0), "a whole number of its own"),
        (lambda c: c["annotations"][0].update(image_id=5), "no image with the id 5"),
        (lambda c: c["annotations"][0].update(category_id=1), "no category with the id 1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "is not left, top, width, height"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, None]), "is not left, top, width, height"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "neither polygons"),
        (lambda c: c["annotations"][0].update(segmentation={"size": 3}), "neither polygons"),
        (lambda c: c["categories"][0].update(name=""), "needs a name"),
        (lambda c: c["categories"][0].update(name="circle"), "a name of its own"),
    ],
)
def test_bad_files(coco, change, words):
    changed(coco[0], change)
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        read_coco(*coco)


def test_no_such_file_no_json_other_classes(coco, tmp_path):
    file, photos = coco
    with pytest.raises(DataError, match="no such file"):
        read_coco(tmp_path / "none.json", photos)
    (tmp_path / "bad.json").write_text("[1, 2", encoding="utf-8")
    with pytest.raises(DataError, match="no JSON"):
        read_coco(tmp_path / "bad.json", photos)
    with pytest.raises(DataError, match="the detector knows a, b"):
        read_coco(file, photos, classes=["a", "b"])


def test_thin_objects_are_left_out_and_told(coco):
    changed(coco[0], lambda content: content["annotations"][0].update(bbox=[1, 1, 0.5, 9]))
    assert "1 objects narrower than a pixel" in str(read_coco(*coco))
