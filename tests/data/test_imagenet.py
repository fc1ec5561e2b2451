"""Class folders, and official ImageNet layouts with every way they can be wrong."""

import hashlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from tests.data.official import ALL, write_classes, write_corruptions
from tinymim.data.imagenet import check_layout, read_class_folder, wnids
from tinymim.data.robust import ALEXNET
from tinymim.errors import ConfigError, DataError


def test_ids_follow_sorted_names_and_photos_are_found_below(tmp_path):
    write_classes(tmp_path, ["b", "a10", "a9"], photos=2)
    shutil.move(tmp_path / "b/0.JPEG", tmp_path / "b/deep.png")
    (tmp_path / "b/deeper").mkdir()
    shutil.move(tmp_path / "b/1.JPEG", tmp_path / "b/deeper/x.jpg")
    for noise in ("README.txt", "a9/notes.md", "b/.hidden.jpg", ".cache/x.jpg"):
        (tmp_path / noise).parent.mkdir(exist_ok=True)
        (tmp_path / noise).touch()
    data = read_class_folder(tmp_path)
    assert data.classes == ["a10", "a9", "b"]
    assert [str(f.relative_to(tmp_path)) for f in data.files[4:]] == ["b/deep.png", "b/deeper/x.jpg"]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.index is None
    assert str(data) == f"{tmp_path}: 6 photos of 3 classes"


def test_a_validation_folder_keeps_the_training_ids(tmp_path):
    train = read_class_folder(write_classes(tmp_path / "train", [ALL[5], ALL[2], ALL[9]]))
    write_classes(tmp_path / "val", [ALL[9], ALL[5]])
    (tmp_path / "val" / ALL[2]).mkdir()  # an empty class is a class
    val = read_class_folder(tmp_path / "val", train.classes)
    assert (val.labels.tolist(), val.classes, val.index) == ([1, 2], train.classes, [2, 5, 9])
    with pytest.raises(DataError, match=r"1 sub-folder of .* without photos: n01484850"):
        read_class_folder(tmp_path / "val")
    write_classes(tmp_path / "val", ["n99999999"])
    with pytest.raises(DataError, match=r"1 unknown class: n99999999\n.*the 3 known ones are"):
        read_class_folder(tmp_path / "val", train.classes)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no folder at"),
        ([""], "its 1 photos are not in class folders"),
        (["train", "val"], "holds train, val and no classes"),
    ],
)
def test_folders_without_classes(tmp_path, names, words):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no photos in .*/empty"):
        read_class_folder(tmp_path / "empty", ["a", "b"])
    for name in names:
        write_classes(tmp_path / "data", [name])
    with pytest.raises(DataError, match=words):
        read_class_folder(tmp_path / "data")


@given(st.dictionaries(st.text("abc019_", min_size=1, max_size=4), st.integers(1, 3), min_size=1, max_size=5))
def test_labels_agree_with_torchvision(tmp_path_factory, counts):
    root = tmp_path_factory.mktemp("classes")
    for name, count in counts.items():
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.jpg").touch()
    ours, theirs = read_class_folder(root), ImageFolder(str(root))
    assert ours.classes == theirs.classes
    assert [(str(f), int(y)) for f, y in zip(ours.files, ours.labels, strict=True)] == theirs.samples


# ---- official layouts


def test_wnid_lists():
    """Known samples: tench 0, goldfish 1, toilet tissue 999; the first ids of the authors' masks."""
    a, r = wnids("imagenet-a"), wnids("imagenet-r")
    assert [len(set(x)) for x in (ALL, a, r)] == [1000, 200, 200]
    assert (ALL[0], ALL[1], ALL[999]) == ("n01440764", "n01443537", "n15075141")
    assert [ALL.index(x) for x in a[:9]] == [6, 11, 13, 15, 17, 22, 23, 27, 30]
    assert [ALL.index(x) for x in r[:8]] == [1, 2, 4, 6, 8, 9, 11, 13]
    assert ALL.index(a[-1]) == 988
    digests = [hashlib.sha256(str([ALL.index(x) for x in kind]).encode()).hexdigest()[:16] for kind in (a, r)]
    assert digests == ["a2d0b3a7d6a8360f", "1bfdbfb1fe9bc564"]  # all of them, as compared with the authors' lists
    assert all(tuple(sorted(x)) == x for x in (ALL, a, r))
    assert wnids("imagenet-c") == ALL


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r"])
def test_a_small_copy_is_warned_of(tmp_path, kind):
    names = wnids(kind)
    write_classes(tmp_path, names[:-2])
    (tmp_path / "README.txt").touch()
    (tmp_path / names[-1]).mkdir()
    report = check_layout(tmp_path, kind)
    assert report.photos == 198
    official = 7500 if kind == "imagenet-a" else 30000
    assert report.warnings == [
        f"no photos of 2 of 200 classes: {names[-2]}, {names[-1]}",
        f"198 photos; the official {kind} has {official}",
    ]


def test_the_official_number_of_photos_is_not_warned_of(tmp_path):
    (tmp_path / "fifty").mkdir()
    for i in range(50):
        (tmp_path / "fifty" / f"{i}.JPEG").touch()
    root = tmp_path / "root"
    root.mkdir()
    for name in ALL:
        (root / name).symlink_to(tmp_path / "fifty")
    report = check_layout(root, "imagenet")
    assert (report.photos, report.warnings) == (50_000, [])
    with pytest.raises(DataError, match="its classes are those of imagenet\n"):
        check_layout(root, "imagenet-a")


def test_flat_validation_photos_say_what_to_run(tmp_path):
    """The whole set unpacked as it comes; a few photos of those names (Imagenette's) may be anything."""
    for i in range(3):
        (tmp_path / f"ILSVRC2012_val_{i + 1:08d}.JPEG").touch()
    with pytest.raises(DataError, match="no class folders in"):
        check_layout(tmp_path, "imagenet")
    for i in range(3, 1001):
        (tmp_path / f"ILSVRC2012_val_{i + 1:08d}.JPEG").touch()
    with pytest.raises(DataError, match="1001 validation photos and no class folders") as caught:
        check_layout(tmp_path, "imagenet")
    assert "ImageNet('FOLDER', 'val')" in caught.value.fix


def nested(root):
    write_classes(root / "imagenet-a", wnids("imagenet-a")[:3])


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (nested, "imagenet-a", "one level deeper\n.*give .*/data/imagenet-a"),
        (lambda d: write_classes(d, wnids("imagenet-r")), "imagenet-a", "its classes are those of imagenet-r"),
        (lambda d: write_classes(d, wnids("imagenet-a")), "imagenet", "its classes are those of imagenet-a"),
        (lambda d: write_classes(d, ["tench", "goldfish"]), "imagenet", "2 folders .*: goldfish, tench\n.*by wnids"),
        (lambda d: write_classes(d, [ALL[0], "n00000001"]), "imagenet", "1 folder .*n00000001\n.*not among its 1000"),
        (lambda d: write_classes(d, [ALL[6], "misc"]), "imagenet-a", "1 folder .*misc\n.*would be a class"),
        (lambda d: write_classes(d, [""]), "imagenet-r", "are not in class folders"),
        (lambda d: d.mkdir(), "imagenet-r", "it holds no folder"),
        (lambda d: None, "imagenet", "no folder at"),
        (lambda d: write_classes(d, ALL[:2]), "imagenet-c", "no corruption folder"),
        (lambda d: write_corruptions(d / "in", ["fog"], ALL[:1]), "imagenet-c", "one level deeper\n.*give .*/data/in"),
        (lambda d: write_corruptions(d, ["fog"], ["fish"]), "imagenet-c", "fog/1 has 1 folder .*fish"),
        (lambda d: write_classes(d, ["fog/1", "fog/2"]), "imagenet-c", "complete\n.*fog .* no severity 3, 4, 5"),
        (lambda d: write_classes(d, ["fog/1", "weather/fog/1"]), "imagenet-c", "fog is in .* twice"),
    ],
)
def test_folders_that_mean_something_else(tmp_path, make, kind, words):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=words):
        check_layout(tmp_path / "data", kind)


def test_unknown_kind(tmp_path):
    with pytest.raises(ConfigError, match="no dataset 'imagenet-v2'"):
        check_layout(tmp_path, "imagenet-v2")


@pytest.mark.parametrize("grouped", [False, True])
def test_imagenet_c_with_and_without_groups(tmp_path, grouped):
    names = [*ALEXNET, "spatter"]
    write_corruptions(tmp_path, names, ALL[:2], grouped=grouped)
    report = check_layout(tmp_path, "imagenet-c")
    assert (set(report.corruptions), report.photos) == (set(names), 16 * 5 * 2)
    assert [w.split(":")[0] for w in report.warnings] == [
        "classes without photos in 80 severity folders",
        "80 severity folders with other than the official 50000 photos",
    ]
    home = tmp_path / "weather" / "fog" if grouped else tmp_path / "fog"
    assert report.corruptions["fog"] == home
    shutil.rmtree(home / "4")
    (tmp_path / "style").mkdir()
    report = check_layout(tmp_path, "imagenet-c")
    assert set(names) - set(report.corruptions) == {"fog"}
    assert report.warnings[:3] == [
        "left out, not corruptions of ImageNet-C: style",
        "fog is left out, it has no severity 4",
        "no mCE without fog",
    ]
