"""``tinymim data FOLDER``: what is found in folders of every kind, each of which is spoilt in one way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_convert import flat, masks, photo, write_coco, write_rgb
from tinymim import cli
from tinymim.data.convert import split_folder
from tinymim.data.examine import examine
from tinymim.demo.scenes import write_scenes
from tinymim.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("made"), train=8, val=3, size=(96, 80), seed=3)


@pytest.fixture
def scenes(made, tmp_path):
    """8 training and 3 validation pairs of drawn scenes, 12 classes, with dataset.json."""
    return shutil.copytree(made, tmp_path / "it's scenes")


def label(root: Path, number: int, split: str = "training") -> Path:
    return sorted((root / "annotations" / split).iterdir())[number]


def photo_of(root: Path, number: int, split: str = "training") -> Path:
    return sorted((root / "images" / split).iterdir())[number]


def edit(path: Path, change) -> None:
    image = Image.open(path)
    ids = np.asarray(image).copy()
    Image.fromarray(change(ids)).save(path)


def told(found) -> str:
    return "\n".join([*map(str, found.problems), *found.notes])


def test_a_good_folder(scenes):
    """The table is what the files hold, and the commands come next."""
    found = examine(scenes)
    assert not found.problems
    assert (found.kind, len(found.photos), len(found.classes)) == ("labelled", 11, 12)
    assert found.sizes == {(96, 80): 11}
    assert found.kinds == {"8-bit grey": 11}
    for split, folder in (("train", "training"), ("val", "validation")):
        ids = [np.asarray(Image.open(path)) for path in sorted((scenes / "annotations" / folder).iterdir())]
        pixels = np.bincount(np.concatenate([i.ravel() for i in ids]), minlength=256)
        for number, row in enumerate(found.classes):
            assert row.shares[split] == pytest.approx(pixels[number] / pixels[:12].sum())
            assert row.photos[split] == sum(bool((i == number).any()) for i in ids)
        assert found.ignored[split] == pytest.approx(pixels[12:].sum() / pixels.sum())
    assert [line.split()[1] for line in found.next_lines()] == ["distill", "segment"]


SPOILT = {
    "no label": (lambda r: label(r, 3).unlink(), "1 of 8 photos in .* have no label", 1),
    "JPEG label": (lambda r: label(r, 3).rename(label(r, 3).with_suffix(".jpg")), "is no PNG", 1),
    "wrong sizes": (
        lambda r: [Image.open(label(r, i)).resize((48, 40), 0).save(label(r, i)) for i in (1, 2)],
        r"48 x 40 pixels, its photo 96 x 80 \(and 1 more files like it\)",
        1,
    ),
    "damaged label": (lambda r: label(r, 6).write_bytes(b"\x89PNG junk"), "cannot read the label", 1),
    "an id beyond": (
        lambda r: [edit(label(r, i), lambda ids: np.where(ids == ids[0, 0], 77, ids)) for i in (0, 5, 7)],
        r"holds the label id 77 \(and 2 more",
        1,
    ),
    "same name": (
        lambda r: shutil.copy(photo_of(r, 0), photo_of(r, 0).with_suffix(".jpeg")),
        "two photos have one name",
        1,
    ),
    "colours": (
        lambda r: edit(label(r, 0), lambda ids: np.dstack([ids] * 3)),
        "holds the colour|no label map",
        1,
    ),
    "no training photos": (lambda r: shutil.rmtree(r / "images/training"), "training needs some", 1),
    "bad dataset.json": (lambda r: (r / "dataset.json").write_text("{", "utf-8"), "not valid JSON", 1),
    "all ignored": (lambda r: edit(label(r, 4), lambda ids: ids * 0 + 255), "1 labels are ignored all over", 0),
    "damaged photo": (
        lambda r: photo_of(r, 3).write_bytes(photo_of(r, 3).read_bytes()[:600]),
        "1 photos cannot be read, training passes over them",
        0,
    ),
    "the same photo": (
        lambda r: shutil.copy(photo_of(r, 1), photo_of(r, 2, "validation")),
        "1 photos are in training and in validation",
        0,
    ),
    "a copy of other bytes": (
        lambda r: Image.open(photo_of(r, 1)).save(photo_of(r, 2, "validation"), quality=70),
        "1 validation photos look the same as a training photo",
        0,
    ),
    "twice in training": (lambda r: shutil.copy(photo_of(r, 1), photo_of(r, 2)), "2 photos have one content", 0),
    "a class in validation only": (
        lambda r: [edit(label(r, i), lambda ids: np.where(ids == 5, 0, ids)) for i in range(8)],
        "in validation only, so they cannot be learned: road",
        0,
    ),
    "a class nowhere": (
        lambda r: change(r, lambda about: about["classes"].append("ghost") or about.pop("palette")),
        "in no label: ghost",
        0,
    ),
    "void as a class": (
        lambda r: change(r, lambda about: about["classes"].__setitem__(3, "Void")),
        "'Void' is trained as a class",
        0,
    ),
    "stray": (lambda r: shutil.copy(photo_of(r, 0), r / "images" / "stray.jpg"), "1 photos are in neither", 0),
    "scan": (lambda r: (r / "dataset.json").unlink(), 'id 0 is read as a class .* if it means "no class"', 0),
    "16 bit": (
        lambda r: edit(label(r, 0), lambda ids: ids.astype(np.uint16)),
        "^$",
        0,
    ),
    "palette in another order": (lambda r: shuffled(r), "1 palette labels show other colours than dataset.json", 0),
    "interpolated": (
        lambda r: [
            (r / "dataset.json").unlink(),
            *(_blurred(p) for p in r.glob("annotations/*/*.png")),
        ],
        "look as if JPEG or a resize had changed them",
        1,
    ),
}


def _blurred(path: Path) -> None:
    """A label of ids 20 apart, resized with interpolation."""
    Image.fromarray(np.asarray(Image.open(path)) * 20).resize((90, 75), 2).resize((96, 80), 2).save(path)


def change(root: Path, how) -> None:
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    how(about)
    (root / "dataset.json").write_text(json.dumps(about), "utf-8")


def shuffled(root: Path) -> None:
    about = json.loads((root / "dataset.json").read_text("utf-8"))
    image = Image.open(label(root, 0))
    ids = np.asarray(image)
    turned = Image.fromarray(np.uint8((ids + 1) % 12))
    turned.putpalette(bytes(v for i in range(12) for v in about["palette"][(i - 1) % 12]).ljust(768, b"\0"))
    turned.save(label(root, 0))


@pytest.mark.parametrize("kind", SPOILT)
def test_what_training_would_refuse_or_mistake(scenes, kind):
    spoil, words, problems = SPOILT[kind]
    spoil(scenes)
    found = examine(scenes)
    assert re.search(words, told(found), re.DOTALL) or (words == "^$" and found.kinds["16-bit grey"] == 1), told(found)
    assert len(found.problems) >= problems if problems else not found.problems, told(found)
    assert found.next_lines()[0].startswith("tinymim data" if found.problems else "tinymim distill")


def test_all_that_is_wrong_is_told_at_once(scenes):
    """What one run of training would tell, one after the other."""
    for kind in ("wrong sizes", "damaged label", "an id beyond", "damaged photo", "same name"):
        SPOILT[kind][0](scenes)
    text = told(examine(scenes))
    for kind in ("wrong sizes", "damaged label", "damaged photo", "same name"):
        assert re.search(SPOILT[kind][1], text, re.DOTALL), kind
    assert "holds the label id 77" in text


def test_other_folders_and_what_comes_next(scenes, tmp_path):
    """Photos and labels of one name, photos alone, other formats, masks in colours, and of 0 and 255."""
    assert examine(flat(tmp_path / "flat")).next_lines() == [
        f"tinymim data {tmp_path}/flat --split 0.2 --out flat-ade20k"
    ]
    alone = examine(scenes / "images")
    assert (alone.kind, alone.summary.split(": ")[1]) == ("photos", "11 photos without labels")
    assert alone.next_lines()[0].startswith("tinymim distill")
    assert "--from coco" in examine(write_coco(tmp_path / "coco", masks(2))).next_lines()[0]
    rgb = examine(write_rgb(tmp_path / "rgb", masks(2)))
    assert "--from rgb-masks" in rgb.next_lines()[0]
    assert "colours are read where dataset.json has a palette" in told(rgb)
    for i, ids in enumerate(masks(3)):
        photo(tmp_path / "binary" / f"{i}.jpg", i)
        Image.fromarray(np.uint8(ids > 0) * 255).save(tmp_path / "binary" / f"{i}.png")
    binary = examine(tmp_path / "binary")
    assert "are masks of 0 and 255" in told(binary)
    assert "--from rgb-masks" in binary.next_lines()[0]
    with pytest.raises(DataError, match=r"masks of 0 and 255(?s:.*)--from rgb-masks"):
        split_folder(tmp_path / "binary", tmp_path / "new")
    shutil.rmtree(scenes / "images" / "validation")
    assert "--split 0.2" in examine(scenes).next_lines()[0]
    (tmp_path / "nothing").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "gone"):
        with pytest.raises(DataError, match=r"no photos in|no folder at"):
            examine(path)


def test_the_command_prints_a_table_and_writes_a_page(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (scenes / "images/training/scene_00000.jpg").rename(scenes / "images/training/<b>.jpg")
    (scenes / "annotations/training/scene_00000.png").rename(scenes / "annotations/training/<b>.png")
    assert cli.main(["data", scenes.name]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^sky +\d+\.\d\d +\d +\d+\.\d\d +\d$", said, re.MULTILINE)
    assert "next:    tinymim segment linear_tinymim_t_small_data --data-root 'it'\"'\"'s scenes' --student" in said
    page = (tmp_path / "data.html").read_text("utf-8")
    assert page.count('src="data:image/jpeg') == 10
    assert "&lt;b&gt;.jpg" in page
    assert "<b>.jpg" not in page
    (scenes / "dataset.json").unlink()
    label(scenes, 3).unlink()
    assert cli.main(["data", scenes.name, "--reduce-zero-label", "--page", "other.html"]) == 1
    said = capsys.readouterr().out
    assert "refused: 1 of 8 photos" in said
    assert "next:    tinymim data 'it'\"'\"'s scenes' --reduce-zero-label" in said
    assert "have no label" in (tmp_path / "other.html").read_text("utf-8")


@pytest.mark.slow
def test_real_photos(shared):
    """CamVid: its table of classes, and nothing that training would refuse."""
    found = examine(shared / "data" / "camvid")
    assert (len(found.pairs["train"]), len(found.pairs["val"]), found.problems) == (367, 101, [])
    assert {row.name: round(100 * row.shares["train"], 1) for row in found.classes}["Road"] == 33.0
