"""Labelled folders: what the ids mean, and every way a folder can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export.photographs import write_labelled
from tinymim.data import photo_files
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
        ([], "classes"),
        ({"classes": []}, "classes"),
        ({"classes": {"a": 0}}, '"classes" is .*, not a list'),
        ({"classes": ["a"]}, "only class is 'a'; name the background"),
        ({"classes": ["a", "b", "a"]}, "has 'a' twice"),
        ({"classes": ["a", " "]}, "number 1 is .*, which is no name"),
        ({"classes": ["a", None]}, "number 1 is null"),
        ({"classes": ["a", 7]}, "number 1 is 7"),
        ({"classes": ["a", "b\x1b[31m\n"]}, "number 1 is"),
        ({"classes": ["a", "\ud800"]}, "number 1 is"),
        ('{"classes": ["a", "b"], "classes": ["b", "a"]}', 'has "classes" twice'),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, "each of the 2 classes"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0], [0, True, 0]]}, "palette"),
        ({"classes": ["a", "b"], "palette": "red"}, '"palette" is "red", not a list'),
        ({"classes": ["a", "b"], "ignore": [-1]}, "ids from 0 to 65535, not -1"),
        ({"classes": ["a", "b"], "ignore": [10**40]}, "ids from 0 to 65535"),
        ({"classes": ["a", "b"], "ignore": [True]}, "ids from 0 to 65535"),
        ({"classes": ["a", "b"], "ignore": [0, 1]}, "lists the id of every class"),
        ({"classes": ["a", "b"], "ignore": [1, 2], "zero_is_ignored": True}, "lists the id of every class"),
        ({"classes": ["a", "b"], "name": ["x"]}, '"name" is .*, not a text'),
        ("[" * 100_000, "cannot use"),
        ('{"classes": ["' + "a" * (1 << 20) + '"]}', "bytes, a dataset.json a few thousand"),
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


@pytest.fixture(autouse=True)
def said(capsys):
    """What was told since the test began."""
    photo_files.print_once.cache_clear()
    return lambda: capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """``folder(make)``: a labelled folder without dataset.json whose labels are ``make(grey photo)``."""

    def write(make, meta=None):
        root = write_labelled(tmp_path / "d", ["a", "b"], lambda photo: make(np.asarray(photo.convert("L"))), 3, 2)
        (root / "dataset.json").unlink()
        if meta is not None:
            (root / "dataset.json").write_text(json.dumps(meta))
        return root

    return write


def binary(grey):
    return np.uint8(grey > 127) * 255


@pytest.mark.parametrize("meta", [None, {"classes": ["background", "tumour"]}])
def test_masks_of_0_and_255_are_refused_and_the_remedy_works(folder, meta, monkeypatch):
    root = folder(binary, meta)
    with pytest.raises(DataError, match="are masks of 0 and 255") as caught:
        read_layout(root)
    python = caught.value.fix.split('python -c "')[1].split('"')[0]
    monkeypatch.setattr("sys.argv", ["-c", *map(str, root.glob("annotations/*/*.png"))])
    exec(python, {})
    layout = read_layout(root)
    assert len(layout.classes) == 2
    assert 0.1 < np.mean(layout.read_label(layout.train[0][1])) < 0.9


def test_255_beside_two_classes_is_void(folder):
    layout = read_layout(folder(lambda grey: np.where(grey > 200, 255, grey > 99).astype(np.uint8)))
    assert layout.counted(layout.train[0][1]) == {0, 1}


@pytest.mark.parametrize("value", [0, 1, 7])
@pytest.mark.parametrize("void", [None, 255, 200])
def test_a_single_class_is_refused(folder, value, void):
    root = folder(lambda grey: np.where((grey > 127) & (void is not None), void or 0, value).astype(np.uint8))
    with pytest.raises(DataError, match=r"hold one class|masks of 0 and 255"):
        read_layout(root, ignore_label=200)


def test_a_split_with_one_class_is_told_and_one_without_any_is_refused(folder, said):
    root = folder(lambda grey: np.uint8(grey > 127), {"classes": ["a", "b"], "ignore": [9]})
    for label in (root / "annotations" / "validation").iterdir():
        Image.fromarray(np.full((60, 90), 1, np.uint8)).save(label)
    assert len(read_layout(root).need("val")) == 2
    assert "the labels of validation hold one class only, 'b'" in said()
    for label in (root / "annotations" / "validation").iterdir():
        Image.fromarray(np.full((60, 90), 9, np.uint8)).save(label)
    layout = read_layout(root)
    assert layout.need("train")
    with pytest.raises(DataError, match=r"no pixel of the labels of .*validation counts\n.*\(9, 255\)"):
        layout.need("val")


def test_gaps_are_told_and_kept(folder, said):
    layout = read_layout(folder(lambda grey: np.uint8([0, 1, 4, 9])[grey // 64]))
    assert len(layout.classes) == 10
    assert "no label holds the ids 2, 3, 5 to 8; they are kept as classes without pixels" in said()


@pytest.mark.parametrize("how", ["JPEG", "resized", "resized far"])
def test_ids_that_jpeg_or_a_resize_made_up(folder, tmp_path, how):
    def spoil(grey):
        label = Image.fromarray(np.uint8([0, 40, 90, 200])[grey // 64])
        if how == "JPEG":
            label.save(tmp_path / "a.jpg", quality=80)
            return np.asarray(Image.open(tmp_path / "a.jpg"))
        small = (30, 20) if how == "resized" else (6, 4)
        return np.asarray(label.resize(small, Image.Resampling.NEAREST).resize((90, 60), Image.Resampling.BILINEAR))

    root = folder(spoil)
    with pytest.raises(DataError, match=r"as if JPEG or a resize .*\n.*thin lines and specks.*\n.*nearest neighbour"):
        read_layout(root)


def test_rare_ids_are_told(folder, shared, tmp_path, said):
    """JPEG on ids that lie side by side: nothing is certain, but ids beyond the last class are rare."""
    camvid = sorted((shared / "data" / "camvid" / "annotations" / "validation").glob("*.png"))[:5]
    root = folder(lambda grey: np.uint8(grey > 127))
    for path, label in zip(camvid, sorted(root.glob("annotations/*/*.png")), strict=True):
        Image.fromarray(np.asarray(Image.open(path))).save(tmp_path / "a.jpg", quality=75)
        Image.open(tmp_path / "a.jpg").convert("L").save(label)
    read_layout(root)
    assert "the ids 13 to 16 fill less than 0.05% of the pixels each; if JPEG" in said()


def test_many_classes_are_not_taken_for_made_up_ones(folder):
    layout = read_layout(
        folder(lambda grey: (np.arange(90) // 3 + 30 * (np.arange(60)[:, None] // 30)).astype(np.uint8))
    )
    assert len(layout.classes) == 60


@pytest.mark.parametrize("void", [256, 1000, 65535])
def test_void_beyond_255(folder, void):
    root = folder(lambda grey: np.where(grey > 180, void, grey > 99).astype(np.uint16))
    with pytest.raises(DataError, match=rf"they hold {void}\n  fix: .*--ignore-label {void}"):
        read_layout(root)
    layout = read_layout(root, ignore_label=void)
    label = layout.train[0][1]
    raw = np.asarray(Image.open(label))
    np.testing.assert_array_equal(layout.read_label(label), np.where(raw == void, 255, raw))
    (root / "dataset.json").write_text(json.dumps({"classes": ["a", "b"], "ignore": [void]}))
    np.testing.assert_array_equal(read_layout(root).read_label(label), layout.read_label(label))
    Image.fromarray(np.full((60, 90), 300, np.uint16)).save(label)
    with pytest.raises(DataError, match="holds the label id 300"):
        layout.read_label(label)


@pytest.mark.parametrize("wrong", [-1, -100, 65536, 10**30, True, [0, -1], 1.0])
def test_ignore_labels_that_are_no_ids(folder, wrong):
    root = folder(lambda grey: np.uint8(grey > 127))
    with pytest.raises(DataError, match=r"--ignore-label .* is no label id"):
        read_layout(root, ignore_label=wrong if isinstance(wrong, list) else [wrong])


def test_a_jpeg_called_png(folder):
    root = folder(lambda grey: np.uint8(grey > 127))
    label = root / "annotations" / "training" / "0.png"
    Image.fromarray(np.zeros((60, 90), np.uint8)).save(label, format="JPEG")
    with pytest.raises(DataError, match=r"0\.png is no PNG"):
        read_layout(root)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_few_bits_are_the_values_themselves(folder, bits):
    from tests.test_pixels import png

    root = folder(lambda grey: np.uint8(grey > 127))
    ids = (np.arange(88) // 5 + np.zeros((60, 1), int)) % (1 << bits)
    lines = [np.packbits(np.unpackbits(np.uint8(row)[:, None], axis=1)[:, -bits:].ravel()) for row in ids]
    label = png(root / "annotations" / "training" / "0.png", bits, 0, lines, size=(88, 60))
    Image.new("RGB", (88, 60)).save(root / "images" / "training" / "0.png")
    np.testing.assert_array_equal(read_layout(root).read_label(label), ids)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_sizes_are_compared_before_work_starts(folder, split, tmp_path):
    root = folder(lambda grey: np.uint8(grey > 127))
    name = "train" if split == "training" else "val"
    photo, label = getattr(read_layout(root), name)[1]
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(photo).convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif)  # the label is upright, as a viewer shows it
    assert read_layout(root).need(name)
    upright.save(photo, exif=exif)  # the label lies on its side, like the pixels
    with pytest.raises(DataError, match=r"is 90 x 60 pixels, its photo 60 x 90, turned as its EXIF says"):
        read_layout(root).need(name)
    upright.resize((45, 30)).save(photo)
    with pytest.raises(DataError, match=rf"{label.name} is 90 x 60 pixels, its photo 45 x 30\n"):
        read_layout(root).need(name)
    photo.write_bytes(b"no photo")
    if split == "training":  # it is stepped over
        assert len(read_layout(root).need(name)) == 3
    else:
        with pytest.raises(DataError, match="cannot read the photo"):
            read_layout(root).need(name)
