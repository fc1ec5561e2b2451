"""Which files of a folder are photos: one lister behind every door, whatever lies in the folder."""

import contextlib
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export.photographs import photograph, write_labelled, write_photos
from tinymim import cli
from tinymim.data import photo_files
from tinymim.data.folders import read_layout
from tinymim.data.imagenet import read_class_folder
from tinymim.data.pack import pack
from tinymim.data.photo_files import SUFFIXES, list_photos, subfolders
from tinymim.errors import ConfigError, DataError
from tinymim.files import describe_files
from tinymim_export.precision.calibrate import choose_photos
from tinymim_export.report.photo_rows import _photos
from tinymim_export.runtime.photos import load_photos
from tinymim_export.runtime.predict import _jobs

NOT_UTF8 = os.fsdecode(b"q\xff.png")


@pytest.fixture(autouse=True)
def said(capsys):
    """What was told since the test began."""
    photo_files.print_once.cache_clear()
    return lambda: capsys.readouterr().out


def below(folder, paths):
    return sorted(os.path.relpath(path, folder) for path in paths)


@pytest.fixture
def odd(tmp_path):
    """A folder of three photos, one of a name that is not UTF-8, among everything that is none."""
    folder = tmp_path / "odd"
    (folder / "deep").mkdir(parents=True)
    write_photos(folder / "deep", 1)
    photograph(7).save(folder / "LOUD.TIFF")
    photograph(8).save(folder / NOT_UTF8)
    (folder / "gone.jpg").symlink_to("/nonexistent")
    (folder / "self.png").symlink_to("self.png")
    os.mkfifo(folder / "pipe.jpg")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(str(folder / "socket.jpg"))
    (folder / "folder.jpg").mkdir()
    (folder / "up").symlink_to(folder)
    (folder / "deep" / "back").symlink_to("..")
    for hidden in (".a.jpg", "._LOUD.TIFF", ".thumbs/a.jpg"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no photo")
    (folder / "phone.HEIC").write_bytes(b"")
    return folder


DOORS = {
    "pretrain, distill, study": list_photos,
    "export --photos": lambda folder: load_photos(folder, 99),
    "export --calibration, --tune": lambda folder: choose_photos(folder, 3).photos,
    "predict": lambda folder: [photo for photo, _ in _jobs(folder, folder.parent / "masks")],
    "report": lambda folder: [path for _, path, _ in _photos(folder)[0]],
    "finetune, eval, probes": lambda folder: read_class_folder(folder.parent).files,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_finds_the_photos_and_nothing_else(odd, door, said):
    found = DOORS[door](odd)
    if door == "export --photos":
        assert len(found) == 3
    else:
        assert below(odd, found) == ["LOUD.TIFF", "deep/0.png", NOT_UTF8]
    text = said()
    assert "broken links, or no regular files: gone.jpg, pipe.jpg, self.png and 1 more" in text
    assert "folders that are searched already: deep/back, up" in text
    assert ".heic files, which are not read: phone.HEIC" in text
    assert "thumbs" not in text
    assert text.count("passed over") == 3


def test_links_are_followed_once_and_real_names_come_first(tmp_path):
    for name in ("a/z", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        write_photos(tmp_path / name, 2)
    (tmp_path / "a" / "before").symlink_to(tmp_path / "a" / "z")  # leads to what is listed under its own name
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "twice").symlink_to(tmp_path / "a" / "linked")
    (tmp_path / "elsewhere" / "home").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "one.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    listed = below(tmp_path / "a", list_photos(tmp_path / "a"))
    assert listed == ["linked/0.png", "linked/1.png", "one.png", "z/0.png", "z/1.png"]
    (tmp_path / "root").symlink_to(tmp_path / "a")
    assert below(tmp_path / "root", list_photos(tmp_path / "root")) == listed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_in_any_case_is_read(tmp_path, suffix):
    photograph(0).save(tmp_path / f"a{suffix}", **({"format": "JPEG"} if suffix == ".jfif" else {}))
    (tmp_path / f"a{suffix}").rename(tmp_path / f"b{suffix.upper()}")
    assert len(load_photos(tmp_path)) == 1


@pytest.fixture
def labelled(tmp_path):
    return write_labelled(tmp_path / "d", ["dark", "light"], lambda photo: np.uint8(np.asarray(photo)[..., 0] > 127))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("above", [False, True])
def test_labels_are_never_photos(labelled, door, above, said):
    if door.startswith("finetune"):
        with pytest.raises(DataError, match="labelled folder for segmentation"):
            read_class_folder(labelled)
        return
    found = DOORS[door](labelled.parent if above else labelled)
    assert len(found) in (3, 4, 12)  # calibration takes 3, the report the 4 for validation
    if door != "export --photos":
        assert not [path for path in found if "annotations" in path.parts]
    if above:
        assert "label maps: d/annotations" in said()


@pytest.mark.parametrize("part", ["", "training"])
def test_the_folder_of_the_labels_is_refused(labelled, part):
    with pytest.raises(DataError, match=r"label maps are no photos\n.*--data .*d/images"):
        list_photos(labelled / "annotations" / part)
    (labelled.parent / "link").symlink_to(labelled / "annotations" / part)
    with pytest.raises(DataError, match="holds label maps"):
        list_photos(labelled.parent / "link")


def test_annotations_without_images_are_a_folder_like_others(tmp_path):
    (tmp_path / "annotations").mkdir()
    write_photos(tmp_path / "annotations", 1)
    assert len(list_photos(tmp_path)) == len(list_photos(tmp_path / "annotations")) == 1


def test_a_study_still_hashes_photos_and_labels(labelled):
    assert describe_files(labelled, list_photos(labelled, labels=True))["files"] == 24


def test_folders_that_cannot_be_read(tmp_path, monkeypatch, said):
    (tmp_path / "closed").mkdir()
    write_photos(tmp_path, 1)
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(list_photos(tmp_path)) == 1
    assert "folders that cannot be read (Permission denied): closed" in said()
    for read in (list_photos, subfolders):
        with pytest.raises(DataError, match=r"cannot read the folder .*closed\n  why: Permission denied"):
            read(tmp_path / "closed")


@pytest.mark.parametrize("read", [list_photos, load_photos, choose_photos, read_class_folder])
def test_no_folder_and_no_photo(tmp_path, read):
    (tmp_path / "text.txt").write_text("x")
    for folder in (tmp_path / "absent", tmp_path / "text.txt", tmp_path):
        with pytest.raises(DataError, match=r"no (folder|photos|calibration photos|class folders)"):
            read(folder)


def test_a_run_on_an_odd_folder(odd, tmp_path, capsys):
    """To the end, on a terminal that cannot write its names: pre-training, its report, its resume."""
    shape = ["student_args.embed_dim=32", "student_args.depth=2", "student_args.num_heads=2"]
    argv = ["pretrain", "--data", str(odd), "--out", str(tmp_path / "run"), "--img-size", "32", "--batch-size", "2"]
    argv += ["--model", "tinymim_vit_tiny", "--workers", "0", "--device", "cpu"]
    (odd / os.fsdecode(b"broken\xfe.jpg")).write_bytes(b"no photo")
    for more in (["--max-steps", "2"], ["--max-steps", "2", "--resume"]):
        assert cli.main([*argv, *more, "--cfg-options", *shape]) == 0
    assert Path(tmp_path / "run" / "report.html").is_file()


def test_masks_of_one_name_are_told_apart_or_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "a.png", "A.png", "b.jpg"):
        photograph(0).save(photos / name)
    jobs = _jobs(photos, tmp_path / "masks")
    assert [mask.name for _, mask in jobs] == ["A.png", "a.jpg.png", "a.png.png", "b.png"]
    photograph(0).save(photos / "a.jpg.webp")
    with pytest.raises(
        ConfigError, match=r"two photos share the mask .*a\.jpg\.png\n  why: .*a\.jpg and .*a\.jpg\.webp"
    ):
        _jobs(photos, tmp_path / "masks")


def test_labelled_pairs_follow_links_and_share_linked_labels(labelled, tmp_path, said):
    other = write_labelled(tmp_path / "e", ["a", "b"], lambda photo: np.uint8(np.asarray(photo)[..., 0] > 127))
    for kind in ("images", "annotations"):
        (labelled / kind / "training" / "more").symlink_to(other / kind / "training")
    copy = labelled / "images" / "training" / "copy"
    copy.mkdir()
    photograph(3).save(copy / "3.TIF")
    (labelled / "annotations" / "training" / "copy").symlink_to(other / "annotations" / "training")
    layout = read_layout(labelled)
    assert len(layout.train) == 17
    assert [label.parent.name for photo, label in layout.train if photo.parent.name == "copy"] == ["copy"]
    assert all(label.is_file() for _, label in layout.need("train"))
    assert "8 labels" not in said()  # those of copy/ are labels of more/


def test_a_label_for_every_photo_one_for_each(labelled, said):
    images, labels = (labelled / kind / "training" for kind in ("images", "annotations"))
    (labels / "0.png").rename(labels / "0.PNG")
    (images / "1.png").unlink()
    assert len(read_layout(labelled).train) == 7
    assert "1 labels in" in said()
    photograph(0).save(images / "1.JPG")
    photograph(0).save(images / "1.jpg")
    with pytest.raises(DataError, match=r"two photos have one name: .*1\.JPG and 1\.jpg"):
        read_layout(labelled)
    (images / "1.JPG").unlink()
    Image.open(labels / "1.png").save(labels / "1.Png", format="PNG")
    with pytest.raises(DataError, match=r"two labels have one name: .*1\.Png and 1\.png"):
        read_layout(labelled)
    for label in ("1.Png", "1.png"):
        (labels / label).unlink()
    Image.new("L", (90, 60)).save(labels / "1.jpeg")
    with pytest.raises(DataError, match=r"the label .*1\.jpeg is no PNG"):
        read_layout(labelled)


def test_patterns_of_photos_and_folders(tmp_path, monkeypatch):
    """Braces, * and ? at every reader; names are those below the folder in which the pattern begins."""
    for name in ("a1.png", "a2.PNG", "b1.png", "c1.png", "a.txt", "deep/x/a3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(np.roll(pixels, ord(name[0]))).save(tmp_path / name, "png")
    a, b, deep = [tmp_path / "a1.png", tmp_path / "a2.PNG"], [tmp_path / "b1.png"], [tmp_path / "deep/x/a3.png"]
    for pattern, wanted in (
        ("{a,b}*", [*a, *b]),
        ("?1.png", [a[0], *b, tmp_path / "c1.png"]),
        ("{b,c}1.png", [*b, tmp_path / "c1.png"]),
        ("{a*,deep}", [*a, *deep]),
        ("*/?/a{3..3}.png", deep),
    ):
        assert list_photos(tmp_path / pattern) == wanted
    for pattern in ("{a1,d1}.png", "*.webp"):
        with pytest.raises(DataError, match="nothing at") as caught:
            list_photos(tmp_path / pattern, option="--calibration")
        assert "quote it" in caught.value.fix
    with pytest.raises(DataError, match="no photos in"):
        list_photos(tmp_path / "*.txt")
    found = choose_photos(tmp_path / "{a,d}*", 3)
    assert sorted(name for name, _ in found.files) == ["a1.png", "a2.PNG", "deep/x/a3.png"]
    assert pack(tmp_path / "{a,d}*", tmp_path / "shards").photos == 3
    inside = [str(path).split(".tar/")[1] for path in list_photos(tmp_path / "shards/*.tar")]
    assert inside == sorted(name for name, _ in found.files)
    odd = tmp_path / "odd{1,2}*"
    odd.mkdir()
    shutil.copy(a[0], odd)
    assert list_photos(odd) == [odd / "a1.png"]  # a folder that is there is no pattern
