"""The folder of pseudo-labels: names, bytes, thresholds, what a cut leaves, and everything that is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinymim.data.folders import read_layout
from tinymim.data.pack import pack
from tinymim.data.pixels import open_photo
from tinymim.data.pseudo_labels import layout_names, write_pseudo_labels
from tinymim.errors import ConfigError, DataError, TinyMIMError


class Channels:
    """A segmentor that names the strongest colour; its confidence is that colour's share. Counts what it labels."""

    file, sha256, at_once = Path("channels.pth"), "0" * 64, 2

    def __init__(
        self, *, classes=("red", "green", "blue"), palette=None, one=False, stop_after=None, stop=KeyboardInterrupt
    ):
        self.one, self.classes, self.palette, self.settings = one, classes, palette, {"pipeline": [("a", 1)]}
        self.stop_after, self.stop, self.labelled = stop_after, stop, 0

    def read(self, path):
        return np.asarray(open_photo(path))

    def predict(self, photos):
        if self.stop_after is not None and self.labelled >= self.stop_after:
            raise self.stop
        self.labelled += len(photos)
        best = [photo.argmax(2).astype(np.uint8) * (not self.one) for photo in photos]
        return [(ids, share_of(photo)) for photo, ids in zip(photos, best, strict=True)]


def share_of(photo):
    return (photo.max(2) / (photo.sum(2) + 30)).astype(np.float32)


def picture(path, *, size=(9, 7), seed=0, mode="RGB", **options):
    """A noisy photo, its upper half red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    pixels[: size[1] // 2] = (250, 5, 5)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    """Seven photos: equal names in sub-folders and with other suffixes, turned by EXIF, a palette, odd sizes."""
    root = tmp_path / "photos"
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(root / "a" / "one.jpg", seed=1)
    picture(root / "b" / "one.jpg", seed=2, size=(31, 5), exif=turned)
    picture(root / "b" / "one.png", seed=3, mode="P")
    picture(root / "b" / "ONE.bmp", seed=4)
    picture(root / "b" / "one_png.png", seed=5)
    picture(root / "two words.PNG", seed=6, mode="RGBA")
    picture(root / "z.webp", seed=7)
    return root


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_photos_are_copied_and_labels_fit_what_the_reader_shows(photos, tmp_path):
    result = write_pseudo_labels(Channels(), photos, tmp_path / "out")
    layout = read_layout(tmp_path / "out")
    assert (layout.classes, layout.source, layout.val) == (("red", "green", "blue"), "dataset.json", [])
    assert sorted(p.read_bytes() for p, _ in layout.train) == sorted(files(photos).values())
    names = [layout.name("train", photo) for photo, _ in layout.train]
    assert {"a/one", "b/one_jpg", "b/one_png_", "b/ONE_bmp", "b/one_png", "two words", "z"} == set(names)
    for photo, label in layout.need("train"):
        assert np.array_equal(layout.read_label(label), np.asarray(open_photo(photo)).argmax(2))
    assert (result.photos, result.skipped, result.kept) == (7, [], pytest.approx(1))
    note = json.loads((tmp_path / "out" / "labels.json").read_text(encoding="utf-8"))
    assert (note["kind"], note["model"]["sha256"], note["min_confidence"]) == ("tinymim.label", "0" * 64, 0)
    assert note["environment"]["versions"]["numpy"]
    assert sum(each["kept"] for each in note["classes"].values()) == pytest.approx(1)
    assert note["sure"]["0.5"] > note["sure"]["0.8"] > note["sure"]["0.9"] == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_pixels_below_the_threshold_are_ignored(photos, tmp_path):
    result = write_pseudo_labels(Channels(), photos, tmp_path / "out", min_confidence=0.5)
    layout, kept = read_layout(tmp_path / "out"), 0
    for photo, label in layout.train:
        rgb = np.asarray(open_photo(photo))
        doubted = share_of(rgb) < 0.5
        assert np.array_equal(layout.read_label(label), np.where(doubted, 255, rgb.argmax(2)))
        kept += int((~doubted).sum())
    assert 0 < kept < result.pixels
    assert result.kept == pytest.approx(kept / result.pixels)
    assert result.kept == pytest.approx(result.sure["0.5"])


def test_shards_a_pattern_and_a_single_photo_give_the_labels_of_the_folder(photos, tmp_path):
    for path in (photos / "b" / "ONE.bmp", photos / "b" / "one.png"):  # packing needs other names
        path.unlink()
    whole = write_pseudo_labels(Channels(), photos, tmp_path / "whole").out
    pack(photos, tmp_path / "shards")
    packed = write_pseudo_labels(Channels(), tmp_path / "shards", tmp_path / "packed").out
    assert files(packed / "images") == files(whole / "images")
    assert files(packed / "annotations") == files(whole / "annotations")
    some = write_pseudo_labels(Channels(), photos / "{a,b}", tmp_path / "some").out
    assert files(some / "annotations").items() < files(whole / "annotations").items()
    one = write_pseudo_labels(Channels(), photos / "z.webp", tmp_path / "one").out
    assert [*files(one / "images")] == ["training/z.webp"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_cut_leaves_no_folder_and_the_same_command_continues(photos, tmp_path, capsys, stop):
    whole = files(write_pseudo_labels(Channels(), photos, tmp_path / "whole").out)
    out = tmp_path / "out"
    with pytest.raises((KeyboardInterrupt, TinyMIMError)):
        write_pseudo_labels(Channels(stop_after=4, stop=stop), photos, out)
    assert not out.exists()
    done = int(capsys.readouterr().out.rpartition("note: ")[2].split(" of ")[0])
    assert 0 < done < 7
    with open(tmp_path / ".out.part" / "labels.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"photo": "tor')  # a kill while it is written
    again = Channels()
    write_pseudo_labels(again, photos, out)
    assert again.labelled == 7 - done
    made = files(out)
    notes = [json.loads(each.pop("labels.json")) for each in (made, whole)]
    assert made == whole
    assert notes[0] | {"out": "", "photos_per_second": 0} == notes[1] | {"out": "", "photos_per_second": 0}
    assert not (tmp_path / ".out.part").exists()


def test_what_was_begun_with_other_settings_or_photos_is_not_used(photos, tmp_path):
    for change in (lambda: {"min_confidence": 0.4}, lambda: (photos / "z.webp").unlink() or {}):
        with pytest.raises(KeyboardInterrupt):
            write_pseudo_labels(Channels(stop_after=4), photos, tmp_path / "out")
        again = Channels()
        result = write_pseudo_labels(again, photos, tmp_path / "out", **change())
        assert again.labelled == result.photos
        (tmp_path / "out").rename(tmp_path / f"moved{result.photos}{result.min_confidence}")


def test_a_damaged_photo_is_left_out_and_named(photos, tmp_path, capsys):
    (photos / "a" / "one.jpg").write_bytes(b"no photo")
    result = write_pseudo_labels(Channels(), photos, tmp_path / "out")
    assert (result.photos, len(read_layout(tmp_path / "out").train)) == (6, 6)
    result.print()
    assert "left out" in (said := capsys.readouterr().out)
    assert "one.jpg" in said
    for path in photos.rglob("*.*"):
        path.write_bytes(b"no photo")
    with pytest.raises(DataError, match="no photo can be read"):
        write_pseudo_labels(Channels(), photos, tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["out", "photos"]


@pytest.mark.parametrize(
    ("error", "words", "labeller", "options"),
    [
        (ConfigError, "is there already", {}, {"out": "full"}),
        (ConfigError, "is there already", {}, {"out": "full/file"}),
        (ConfigError, "is inside", {}, {"out": "photos/out"}),
        (ConfigError, "min-confidence 1.5", {}, {"min_confidence": 1.5}),
        (ConfigError, "min-confidence nan", {}, {"min_confidence": float("nan")}),
        (DataError, "no folder at", {}, {"photos": "nowhere"}),
        (DataError, "no photos to label", {}, {"photos": "full"}),
        (DataError, "the labels hold no class", {}, {"min_confidence": 1.0}),
        (DataError, "one class only, 'red'", {"one": True}, {}),
        (DataError, "gives the id 2", {"classes": ("red", "green")}, {}),
        (ConfigError, "cannot label photos", {"classes": ("red", "red", "blue")}, {}),
        (ConfigError, "cannot label photos", {"classes": ("thing",)}, {}),
        (ConfigError, "cannot label photos", {"classes": [f"c{i}" for i in range(256)]}, {}),
        (ConfigError, "cannot label photos", {"palette": [[0, 0, 300]] * 3}, {}),
    ],
)
def test_refused_and_nothing_left(photos, tmp_path, error, words, labeller, options):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    source, out = tmp_path / options.pop("photos", "photos"), tmp_path / options.pop("out", "out")
    before = files(tmp_path)
    with pytest.raises(error, match=words):
        write_pseudo_labels(Channels(**labeller), source, out, **options)
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["full", "photos"]


def test_an_empty_folder_is_filled(photos, tmp_path):
    (tmp_path / "out").mkdir()
    assert write_pseudo_labels(Channels(), photos, tmp_path / "out").photos == 7


def test_names_differ_whatever_the_case(tmp_path):
    paths = [tmp_path / name for name in ("A.jpg", "a.png", "a_jpg.bmp", "A_PNG.webp", "b/a.jpg")]
    stems = [str(Path(name).with_suffix("")).casefold() for name in layout_names(tmp_path, paths)]
    assert len(set(stems)) == 5
    assert "b/a" in stems
