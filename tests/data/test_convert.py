"""``tinymim data --split`` and ``--from``: known masks written in each format, converted, compared."""

import functools
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco

from tinymim import cli
from tinymim.cli.data import FORMATS
from tinymim.data import convert as converting
from tinymim.data import formats
from tinymim.data.convert import convert, split_folder
from tinymim.data.folders import read_layout
from tinymim.data.formats.voc import voc_palette
from tinymim.data.split import choose_validation
from tinymim.errors import ConfigError, DataError, TinyMIMError

H, W = 48, 64
NAMES = ("background", "road", "car", "sign of ä")
PALETTE = ((0, 0, 0), (128, 64, 128), (64, 0, 128), (255, 255, 0))


def masks(count: int = 5) -> list[np.ndarray]:
    """Known ids: a large road, a car on it, a sign on the car, background around."""
    made = []
    for i in range(count):
        ids = np.zeros((H, W), np.uint8)
        cv2.fillPoly(ids, [np.array([(2, 20 + i), (60, 14), (57, 44), (6, 46)])], 1)
        cv2.ellipse(ids, (30 + i, 30), (12, 8), 20, 0, 360, 2, -1)
        ids[26:33, 27 + i : 34 + i] = 3
        made.append(ids)
    return made


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (H, W, 3), np.uint8)).save(path)
    return path


def polygons(mask: np.ndarray, fine: int = 8) -> list[list[float]]:
    """Outlines of a mask, drawn ``fine`` times as large: 8 follows the borders of its pixels, 1 their centres."""
    large = np.kron(mask.astype(np.uint8), np.ones((fine, fine), np.uint8))
    found, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((each.reshape(-1, 2) + 0.5) / fine).ravel().tolist() for each in found]


def areas(ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(id, whole area): what is hidden by smaller objects belongs to the larger ones, too."""
    return [(i, ids >= i) for i in (1, 2, 3)]


def write_coco(root: Path, made: list[np.ndarray], kind: str = "polygons") -> Path:
    things, images = [], []
    for i, ids in enumerate(made):
        photo(root / "images" / f"{i} ü.jpg", i)
        images.append({"id": 7 + i, "file_name": f"{i} ü.jpg", "height": H, "width": W})
        for number, area in areas(ids):
            if kind == "polygons":
                shape = polygons(area)
            elif kind == "runs":
                shape = {"size": [H, W], "counts": coco.encode(np.asfortranarray(area, np.uint8))["counts"].decode()}
            else:  # run lengths as numbers: a crowd
                shape = {"size": [H, W], "counts": runs(area)}
            things.append(
                {"id": len(things), "image_id": 7 + i, "category_id": 10 * number, "segmentation": shape, "area": 1.0,
                 "iscrowd": int(kind == "crowd"), "bbox": [0, 0, 1, 1]}
            )  # fmt: skip
    things.reverse()  # small ones first: the order of the file must not count
    categories = [{"id": 10 * i, "name": NAMES[i]} for i in (3, 1, 2)]
    file = root / "annotations" / "instances_all.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": images, "annotations": things, "categories": categories}), "utf-8")
    return root


def runs(area: np.ndarray) -> list[int]:
    """COCO's run lengths, down the columns, zeros first."""
    flat = area.ravel(order="F").astype(int)
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    lengths = np.diff(ends).tolist()
    return [0, *lengths] if flat[0] else lengths


def write_yolo(root: Path, made: list[np.ndarray]) -> Path:
    for i, ids in enumerate(made):
        split = "val" if i == 0 else "train"
        photo(root / "images" / split / f"{i}.jpg", i)
        lines = [
            " ".join([str(number - 1), *(f"{v / (H if at % 2 else W):.6f}" for at, v in enumerate(polygon))])
            for number, area in areas(ids)
            for polygon in polygons(area)
        ]
        label = root / "labels" / split / f"{i}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("\n".join(lines), "utf-8")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES[1:]))
    (root / "data.yaml").write_text(f"path: .\nnames:\n{names}", "utf-8")
    return root


def write_labelme(root: Path, made: list[np.ndarray]) -> Path:
    for i, ids in enumerate(made):
        file = photo(root / f"{i}.jpg", i).with_suffix(".json")
        shapes = [
            {
                "label": NAMES[number],
                "points": np.reshape(polygon, (-1, 2)).tolist(),
                "shape_type": "polygon",
                "flags": {},
            }
            for number, area in areas(ids)
            for polygon in polygons(area)
        ]
        about = {
            "version": "5.4.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{i}.jpg",
            "imageData": "A" * 90_000,
        }
        file.write_text(json.dumps(about | {"imageHeight": H, "imageWidth": W}), "utf-8")
    return root


def write_voc(root: Path, made: list[np.ndarray]) -> Path:
    for i, ids in enumerate(made):
        photo(root / "JPEGImages" / f"2007_{i}.jpg", i)
        image = Image.fromarray(np.where(ids == 3, 255, ids))
        image.putpalette(bytes(v for colour in voc_palette(256) for v in colour))
        (root / "SegmentationClass").mkdir(exist_ok=True)
        image.save(root / "SegmentationClass" / f"2007_{i}.png")
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("".join(f"2007_{i}\n" for i in range(1, len(made))), "utf-8")
    (sets / "val.txt").write_text("2007_0\n", "utf-8")
    return root


def write_cityscapes(root: Path, made: list[np.ndarray]) -> Path:
    of = np.array([3, 7, 26, 20], np.uint8)  # dynamic, road, car, traffic sign
    for i, ids in enumerate(made):
        split, city = ("val", "lindau") if i == 0 else ("train", "ulm")
        photo(root / "leftImg8bit" / split / city / f"{city}_{i}_leftImg8bit.png", i)
        label = root / "gtFine" / split / city / f"{city}_{i}_gtFine_labelIds.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(of[ids]).save(label)
    return root


def write_rgb(root: Path, made: list[np.ndarray]) -> Path:
    for i, ids in enumerate(made):
        photo(root / "images" / "sub folder" / f"{i}.jpg", i)
        (root / "masks" / "sub folder").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(PALETTE, np.uint8)[ids]).save(root / "masks" / "sub folder" / f"{i}.png")
    lines = ["name,r,g,b", *(f"{n},{r},{g},{b}" for n, (r, g, b) in zip(NAMES, PALETTE, strict=True))]
    (root / "class_dict.csv").write_text("\n".join(lines), "utf-8")
    return root


def converted(layout) -> list[np.ndarray]:
    """Training ids by the number in the name of each photo."""
    every = {
        int("".join(c for c in photo.stem.split("_")[-1] if c.isdigit())): label
        for photo, label in [*layout.train, *layout.val]
    }
    return [layout.read_label(every[i]) for i in sorted(every)]


def recognised(source: Path) -> list[str]:
    """The formats that a folder looks like."""
    return [name for name, each in formats.FORMATS.items() if each.known_by and each.known_by(source)]


def test_the_formats_of_the_options_are_those_that_register():
    assert sorted(FORMATS) == sorted(formats.FORMATS)


@pytest.mark.parametrize(
    ("format", "write", "classes", "expected", "val"),
    [
        ("voc", write_voc, 21, lambda ids: np.where(ids == 3, 255, ids), 1),
        ("cityscapes", write_cityscapes, 19, lambda ids: np.array([255, 0, 13, 7])[ids], 1),
        ("rgb-masks", write_rgb, 4, lambda ids: ids, 1),
        ("coco", lambda root, made: write_coco(root, made, "runs"), 4, lambda ids: ids, 1),
        ("coco", lambda root, made: write_coco(root, made, "crowd"), 4, lambda ids: ids, 1),
    ],
)
def test_masks_come_back_exactly(tmp_path, format, write, classes, expected, val):
    made = masks()
    source = write(tmp_path / "in ä", made)
    assert recognised(source) == ([] if format == "rgb-masks" else [format])
    done = convert(source, format, tmp_path / "out")
    assert (len(done.layout.classes), len(done.layout.val), done.layout.source) == (classes, val, "dataset.json")
    assert done.linked == len(made)
    for found, ids in zip(converted(done.layout), made, strict=True):
        assert np.array_equal(found, expected(ids))


@pytest.mark.parametrize("fine", [8, 1])
@pytest.mark.parametrize(
    ("format", "write"), [("coco", write_coco), ("yolo-seg", write_yolo), ("labelme", write_labelme)]
)
def test_polygons_come_back(tmp_path, monkeypatch, format, write, fine):
    """Exactly where they follow the borders of pixels; through the centres half a pixel is lost, at borders only."""
    monkeypatch.setattr(f"{__name__}.polygons", functools.partial(polygons, fine=fine))
    made = masks()
    source = write(tmp_path / "in", made)
    assert recognised(source) == [format]
    done = convert(source, format, tmp_path / "out")
    assert sorted(done.layout.classes) == sorted(NAMES)
    order = np.array([done.layout.classes.index(name) for name in NAMES])
    for found, ids in zip(converted(done.layout), made, strict=True):
        known = order[ids].astype(np.uint8)
        border = cv2.dilate(known, np.ones((3, 3))) != cv2.erode(known, np.ones((3, 3)))
        differ = found != known
        assert not (differ & ~border).any()
        assert differ.sum() <= (0 if fine > 1 else 0.3 * border.sum())


def test_smaller_objects_lie_on_top_whatever_their_order(tmp_path):
    source = write_coco(tmp_path / "in", masks(2), "runs")
    first = converted(convert(source, "coco", tmp_path / "a").layout)
    file = source / "annotations" / "instances_all.json"
    about = json.loads(file.read_text("utf-8"))
    about["annotations"].reverse()
    file.write_text(json.dumps(about), "utf-8")
    assert np.array_equal(first, converted(convert(source, "coco", tmp_path / "b").layout))


def test_pixels_of_no_object_can_be_ignored(tmp_path):
    source = write_coco(tmp_path / "in", masks(3), "runs")
    layout = convert(source, "coco", tmp_path / "out", ignore_unlabelled=True).layout
    assert layout.classes == NAMES[1:]
    for found, ids in zip(converted(layout), masks(3), strict=True):
        assert np.array_equal(found, np.where(ids == 0, 255, ids.astype(int) - 1))


def test_coco_splits_by_the_names_of_its_files(tmp_path):
    """Roboflow's folders: train, valid and test, each with its photos and one file."""
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        part = write_coco(tmp_path / "make" / name, masks(count), "runs")
        shutil.copytree(part / "images", tmp_path / "in" / name)
        shutil.copy(part / "annotations" / "instances_all.json", tmp_path / "in" / name / "_annotations.coco.json")
    layout = convert(tmp_path / "in", "coco", tmp_path / "out").layout
    assert (len(layout.train), len(layout.val)) == (3, 2)
    with pytest.raises(ConfigError, match="tell training and validation photos themselves"):
        convert(tmp_path / "in", "coco", tmp_path / "other", share=0.3)


def spoil_coco(change):
    def spoil(root: Path) -> None:
        file = root / "annotations" / "instances_all.json"
        about = json.loads(file.read_text("utf-8"))
        change(about)
        file.write_text(json.dumps(about), "utf-8")

    return spoil


def first(**values):
    return spoil_coco(lambda about: about["annotations"][0].update(values))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (first(segmentation=[]), "has no mask.*box only.*tinymim detect"),
        (first(segmentation=[[1, 2, 3, 4]]), "no list of three points or more"),
        (first(segmentation=[["a"] * 6]), "neither polygons nor run lengths"),
        (first(segmentation=[[1e300] * 6]), "no list of three points or more"),
        (first(segmentation={"size": [H, W], "counts": [3]}), "do not fill"),
        (first(segmentation={"size": [H, W], "counts": ""}), "do not fill"),
        (first(segmentation={"size": [H, W], "counts": "zzzz\u00e9"}), "damaged"),
        (first(segmentation={"size": [W, H], "counts": [W * H]}), "of the size"),
        (first(image_id=99), "nothing with its image_id, 99"),
        (first(category_id="car"), "category_id is 'car'"),
        (spoil_coco(lambda a: a.update(annotations=[{"segments_info": []}])), "panoptic format"),
        (spoil_coco(lambda a: a.pop("categories")), "not in COCO's format"),
        (spoil_coco(lambda a: a["categories"].append(a["categories"][0])), "id of its own"),
        (spoil_coco(lambda a: a["images"][0].update(file_name="../7.jpg")), "no name below a folder"),
        (spoil_coco(lambda a: a["images"][0].update(file_name="gone.jpg")), "1 of 3 photos of .* not found"),
        (spoil_coco(lambda a: a["images"][0].update(height=10)), "of the size|do not fill"),
        (lambda root: (root / "annotations/instances_all.json").write_text("{", "utf-8"), "no JSON"),
        (lambda root: shutil.rmtree(root / "annotations"), "no COCO annotations"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_coco_is_told_and_nothing_is_left(tmp_path, spoil, told):
    source = write_coco(tmp_path / "in", masks(3), "runs")
    spoil(source)
    with pytest.raises(DataError, match=f"(?s){told}"):
        convert(source, "coco", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0 0.5 0.5 0.2 0.2", "is a box"),
        ("9 0 0 1 0 1 1", "its class is 9, and data.yaml names 3"),
        ("0 0 0 64 0 64 48", "the coordinate 64"),
        ("0 a b c d e f", "could not convert"),
        ("0 0 0 1 0 1 nan", "three points or more"),
        ("0 0 0 1 0 1 1 1", "three points or more"),
    ],
)
def test_what_is_wrong_in_yolo_is_told(tmp_path, line, told):
    source = write_yolo(tmp_path / "in", masks(3))
    (source / "labels/train/1.txt").write_text(line, "utf-8")
    with pytest.raises(DataError, match=f"(?s)line 1 of .*1.txt.*{told}"):
        convert(source, "yolo-seg", tmp_path / "out")
    (source / "data.yaml").write_text("names: !!python/object/apply:os.system ['touch /tmp/run']", "utf-8")
    with pytest.raises(DataError, match="it is no YAML"):
        convert(source, "yolo-seg", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"shapes": [{"label": "a", "points": [[1, 1], [2, 2]], "shape_type": "line"}]},
            "a line of 2 points has no area",
        ),
        ({"shapes": [{"label": "a", "points": [["x", 1]]}]}, r"shapes\[0\].points\[0\]\[0\] is 'x'"),
        ({"imageWidth": 10}, "was drawn on a photo of 10 x 48"),
        ({"shapes": 3}, "shapes is 3"),
    ],
)
def test_what_is_wrong_in_labelme_is_told(tmp_path, change, told):
    source = write_labelme(tmp_path / "in", masks(3))
    about = json.loads((source / "1.json").read_text("utf-8")) | change
    (source / "1.json").write_text(json.dumps(about), "utf-8")
    with pytest.raises(DataError, match=f"(?s){told}"):
        convert(source, "labelme", tmp_path / "out")


def test_labelme_shapes_with_an_area(tmp_path):
    """Rectangles and circles; photos without a file are left out, which is told."""
    photo(tmp_path / "in" / "a.jpg", 0), photo(tmp_path / "in" / "b.jpg", 1), photo(tmp_path / "in" / "c.jpg", 2)
    for name in "ab":
        shapes = [
            {"label": "box", "points": [[40, 40], [10, 10]], "shape_type": "rectangle"},
            {"label": "disc", "points": [[25, 25], [25, 30]], "shape_type": "circle"},
            {"label": "__ignore__", "points": [[0, 0], [4, 0], [4, 4], [0, 4]]},
        ]
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps({"version": "5", "shapes": shapes}), "utf-8")
    done = convert(tmp_path / "in", "labelme", tmp_path / "out")
    label = done.layout.read_label(done.layout.train[0][1])
    assert done.layout.classes == ("background", "box", "disc")
    assert (label == 1).sum() + (label == 2).sum() == 900
    assert abs((label == 2).sum() - np.pi * 25) < 4
    assert (label == 255).sum() == 16
    assert "1 photos have no .json file and are left out" in done.notes


def test_what_is_wrong_in_the_others_is_told(tmp_path):
    voc = write_voc(tmp_path / "voc", masks(3))
    Image.fromarray(np.full((H, W), 30, np.uint8)).save(voc / "SegmentationClass" / "2007_1.png")
    with pytest.raises(DataError, match="holds the id 30"):
        convert(voc, "voc", tmp_path / "out")
    (voc / "labels.txt").write_bytes("Straße\nLöwe".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot use .*labels\.txt"):
        convert(voc, "voc", tmp_path / "out")
    (voc / "labels.txt").unlink()
    (voc / "SegmentationClass" / "2007_1.png").unlink()
    with pytest.raises(DataError, match="2007_1 is listed"):
        convert(voc, "voc", tmp_path / "out")
    shutil.rmtree(voc / "SegmentationClass")
    (voc / "Annotations").mkdir()
    with pytest.raises(DataError, match="boxes only"):
        convert(voc, "voc", tmp_path / "out")
    city = write_cityscapes(tmp_path / "city", masks(3))
    next((city / "gtFine/train/ulm").iterdir()).unlink()
    with pytest.raises(DataError, match="has no label"):
        convert(city, "cityscapes", tmp_path / "out")
    rgb = write_rgb(tmp_path / "rgb", masks(3))
    pixels = np.array(PALETTE, np.uint8)[masks(1)[0]]
    pixels[5, 9] = (1, 2, 3)
    Image.fromarray(pixels).save(rgb / "masks/sub folder/1.png")
    with pytest.raises(DataError, match=r"holds the colour \(1, 2, 3\) at the pixel x=9, y=5"):
        convert(rgb, "rgb-masks", tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing at"):
        convert(tmp_path / "gone", "voc", tmp_path / "out")
    for name in formats.FORMATS:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(TinyMIMError):
            convert(tmp_path / "empty", name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_of_0_and_255_become_two_classes(tmp_path):
    """Without a table of colours, classes are called by their colours."""
    for i, ids in enumerate(masks(3)):
        photo(tmp_path / "in" / f"{i}.jpg", i)
        Image.fromarray(np.uint8(ids > 0) * 255).save(tmp_path / "in" / f"{i}.png")
    layout = convert(tmp_path / "in", "rgb-masks", tmp_path / "out").layout
    assert layout.classes == ("#000000", "#ffffff")
    for found, ids in zip(converted(layout), masks(3), strict=True):
        assert np.array_equal(found, ids > 0)
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "0.png")
    with pytest.raises(DataError, match="colours"):
        convert(tmp_path / "in", "rgb-masks", tmp_path / "again")


def test_a_photo_turned_by_exif_needs_a_label_of_its_upright_size(tmp_path):
    source = write_coco(tmp_path / "in", masks(2), "runs")
    image = Image.open(source / "images" / "0 ü.jpg")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(source / "images" / "0 ü.jpg", exif=exif)
    assert ImageOps.exif_transpose(Image.open(source / "images" / "0 ü.jpg")).size == (H, W)
    with pytest.raises(DataError, match="turned as its EXIF says"):
        convert(source, "coco", tmp_path / "out")


def flat(root: Path, count: int = 10) -> Path:
    """Photos and labels side by side; class 3 in two of them only."""
    for i, ids in enumerate(masks(count)):
        photo(root / f"photo {i}.JPG", i)
        Image.fromarray(np.where((ids == 3) & (i not in (2, 7)), 0, ids).astype(np.uint8)).save(root / f"photo {i}.png")
    return root


def test_a_flat_folder_is_split_by_class_and_seed(tmp_path):
    source = flat(tmp_path / "in")
    done = split_folder(source, tmp_path / "out", share=0.3)
    assert (len(done.layout.train), len(done.layout.val), len(done.layout.classes)) == (7, 3, 4)
    for pairs in (done.layout.train, done.layout.val):
        assert {i for _, label in pairs for i in done.layout.counted(label)} == {0, 1, 2, 3}
        for to, label in pairs:
            assert to.read_bytes() == (source / to.name).read_bytes()
            assert label.read_bytes() == (source / label.name).read_bytes()
            assert os.path.samefile(to, source / to.name)
            assert not os.path.samefile(label, source / label.name)  # a label may be corrected in place
    names = [photo.name for photo, _ in done.layout.val]
    assert [p.name for p, _ in split_folder(source, tmp_path / "same", share=0.3, copy=True).layout.val] == names
    assert any(
        [p.name for p, _ in split_folder(source, tmp_path / f"seed{s}", share=0.3, seed=s).layout.val] != names
        for s in (1, 2, 3)
    )
    assert "frames of videos" in done.notes[0]
    with pytest.raises(DataError, match="no labels in"):
        split_folder(tmp_path / "out" / "images" / "training", tmp_path / "x")


def test_photos_and_labels_in_two_folders(tmp_path):
    for i, ids in enumerate(masks(4)):
        photo(tmp_path / "in" / "images" / "seq" / f"{i}.png", i)
        (tmp_path / "in" / "masks" / "seq").mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(tmp_path / "in" / "masks" / "seq" / f"{i}.PNG")
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"classes": NAMES, "palette": PALETTE}), "utf-8")
    layout = split_folder(tmp_path / "in", tmp_path / "out", share=0.25).layout
    assert (layout.classes, layout.source) == (NAMES, "dataset.json")
    assert {photo.parent.name for photo, _ in [*layout.train, *layout.val]} == {"seq"}


def test_ids_that_do_not_count_stay_told_after_a_split(tmp_path, capsys):
    source, out = flat(tmp_path / "in"), tmp_path / "out"
    line = ["data", str(source), "--split", "0.3", "--ignore-label", "1", "--out", str(out)]
    assert cli.main(line) == 0
    about = json.loads((out / "dataset.json").read_text("utf-8"))
    assert about["ignore"] == [1]
    assert read_layout(out).ignore == read_layout(source_layout(out), ignore_label=[1]).ignore
    assert read_layout(out).classes == tuple(about["classes"])
    again = ["data", str(out), "--split", "0.3", "--ignore-label", "1", "--out", str(tmp_path / "again")]
    capsys.readouterr()
    assert cli.main(again) == 2
    assert not (tmp_path / "again").exists()


def source_layout(folder):
    """The same folder without its dataset.json."""
    shutil.copytree(folder, folder.with_name("bare"))
    (folder.with_name("bare") / "dataset.json").unlink()
    return folder.with_name("bare")


def test_what_cannot_be_split_is_told(tmp_path):
    source = flat(tmp_path / "in", 3)
    (source / "dataset.json").write_text(json.dumps({"classes": NAMES}), "utf-8")
    with pytest.raises(ConfigError, match="--ignore-label and"):
        split_folder(source, tmp_path / "out", ignore=[1])
    (source / "dataset.json").unlink()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_folder(source, tmp_path / "out", share=1.0)
    with pytest.raises(ConfigError, match="is inside"):
        split_folder(source, source / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ConfigError, match="there-2"):
        split_folder(source, tmp_path / "there")
    photo(source / "alone.jpg")
    with pytest.raises(DataError, match=r"alone\.jpg in .* is alone"):
        split_folder(source, tmp_path / "out")
    Image.new("L", (W, H)).save(source / "alone.jpeg")
    with pytest.raises(DataError, match="is no PNG"):
        split_folder(source, tmp_path / "out")
    (source / "alone.jpeg").unlink()
    Image.new("L", (W, H - 1)).save(source / "alone.png")
    with pytest.raises(DataError, match="64 x 47 pixels, its photo 64 x 48"):
        split_folder(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "there"}


def test_validation_photos_are_as_many_as_asked_for():
    for count, share in ((2, 0.1), (3, 0.9), (10, 0.2), (101, 0.25)):
        classes = [{0, i % 5} for i in range(count)]
        chosen = choose_validation(classes, share, 0)
        assert abs(len(chosen) - share * count) <= 1.5
        assert 0 < len(chosen) < count
    assert choose_validation([set(), set(), set()], 0.3, 0)  # labels that are ignored all over
    with pytest.raises(DataError, match="one each"):
        choose_validation([{1}], 0.2, 0)


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_leave_nothing(tmp_path, monkeypatch, stop):
    source = write_coco(tmp_path / "in", masks(3), "runs")
    save, calls = converting.save_mask, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise stop
        save(*args)

    monkeypatch.setattr(converting, "save_mask", fail)
    with pytest.raises(
        KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else TinyMIMError, match=r"^$|No space"
    ):
        convert(source, "coco", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_writes_and_says_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "my data", masks())
    assert cli.main(["data", "my data", "--from", "yolo-seg", "--out", "new one"]) == 0
    said = capsys.readouterr().out
    assert "written: new one: 4 training and 1 validation pairs, 4 classes" in said
    assert "next:    tinymim data 'new one'" in said
    assert cli.main(["data", "new one"]) == 0
    assert "tinymim segment" in capsys.readouterr().out
    assert (tmp_path / "data.html").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--split", "0.2"], "FOLDER or --pack is missing"),
        (["in", "--split", "0.2"], "--out is missing"),
        (["in", "--out", "new"], "--split, --from or --pack is missing"),
        (["in", "--seed", "3"], "--seed without --split or --from"),
        (["in", "--split", "0.2", "--out", "new", "--unlabelled", "ignore"], "--unlabelled without --from"),
        (["in", "--split", "0", "--out", "new"], "between 0 and 1"),
        (["in", "--from", "voc", "--out", "new", "--ignore-label", "3"], "--from and --ignore-label 3"),
        (["in", "--pack", "in", "--out", "new"], "--pack and other work"),
        (["gone"], "no folder at gone"),
        (["in", "--page", "in.txt"], "it is a page in HTML"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    flat(tmp_path / "in", 2)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["data", *words]) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_rgb_labels_are_read_as_they_are(tmp_path):
    """The palette of dataset.json, a colour for what does not count, and a colour that nobody named."""
    source = write_rgb(tmp_path / "in", masks(4))
    layout = split_folder(_named(source), tmp_path / "out", share=0.25).layout
    assert layout.classes == NAMES[:3]
    for found, ids in zip(converted(layout), masks(4), strict=True):
        assert np.array_equal(found, np.where(ids == 3, 255, ids))
    label = layout.train[0][1]
    assert sum(layout.count(label).values()) == (layout.read_label(label) != 255).sum()
    rgb = np.asarray(Image.open(label)).copy()
    rgb[7, 11] = (9, 9, 9)
    Image.fromarray(rgb).save(label)
    with pytest.raises(DataError, match=r"holds the colour \(9, 9, 9\) at the pixel x=11, y=7"):
        read_layout(tmp_path / "out")
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    alpha[7, 11] = (0, 0, 0, 255)
    Image.fromarray(alpha).save(label)
    assert read_layout(tmp_path / "out").read_label(label)[7, 11] == 0
    alpha[7, 11, 3] = 0
    Image.fromarray(alpha).save(label)
    with pytest.raises(DataError, match="are transparent"):
        read_layout(tmp_path / "out")


def _named(source: Path) -> Path:
    about = {"classes": NAMES[:3], "palette": PALETTE[:3], "ignore_palette": [PALETTE[3]]}
    (source / "dataset.json").write_text(json.dumps(about), "utf-8")
    return source
