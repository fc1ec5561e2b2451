"""Folders of sequences: LaSOT's layout and flat ones, what is wrong with them before work starts, generated ones."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.track import evaluate_tracker, generate_sequences, read_sequences
from tinymim.track.following import FirstBox


def sequence(folder, frames=3, names=None, size=(40, 30)):
    (folder / "img").mkdir(parents=True)
    for i in range(frames):
        name = names[i] if names else f"{i + 1:08d}.jpg"
        Image.new("RGB", size, (10 * i, 0, 0)).save(folder / "img" / name)
    (folder / "groundtruth.txt").write_text("5,5,10,10\n" * frames, "utf-8")
    return folder


def test_lasots_layout_flat_folders_and_a_single_one(tmp_path):
    sequence(tmp_path / "lasot/cat/cat-2")
    sequence(tmp_path / "lasot/cat/cat-10")
    sequence(tmp_path / "lasot/dog/dog-1")
    (tmp_path / "lasot/readme").mkdir()
    assert [s.name for s in read_sequences(tmp_path / "lasot")] == ["cat/cat-2", "cat/cat-10", "dog/dog-1"]
    assert [s.name for s in read_sequences(tmp_path / "lasot/cat")] == ["cat-2", "cat-10"]
    assert [s.name for s in read_sequences(tmp_path / "lasot/cat/cat-2")] == ["cat-2"]


def test_frames_in_the_order_of_their_numbers_and_absent_ones(tmp_path):
    folder = sequence(tmp_path / "a", names=["10.png", "2.png", "1.png"])
    (folder / "groundtruth.txt").write_text("\ufeff1 2 3 4\r\n5\t6\t7\t8\r\n0,0,0,0\r\n\r\n", "utf-8")
    (folder / "full_occlusion.txt").write_text("0,0,1", "utf-8")
    (folder / "out_of_view.txt").write_text("0\n0\n0\n", "utf-8")
    (found,) = read_sequences(tmp_path)
    assert [path.name for path in found.frames] == ["1.png", "2.png", "10.png"]
    assert found.truth.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert found.visible.tolist() == [True, True, False]
    assert found.size == (40, 30)


def break_(what):
    return lambda folder: (folder / "groundtruth.txt").write_text(what, "utf-8")


WRONG = {
    "no truth": (lambda f: (f / "groundtruth.txt").unlink(), "has no groundtruth.txt"),
    "too short": (break_("5,5,10,10\n"), "the truth is too short"),
    "too long": (break_("5,5,10,10\n" * 4), "the video ends early"),
    "zero box": (break_("5,5,10,10\n5,5,0,10\n5,5,10,10\n"), r"line 2 of .* is no box"),
    "zero box at first": (break_("0,0,0,0\n5,5,10,10\n5,5,10,10\n"), "in the first frame"),
    "no number": (break_("5,5,10,10\nx,5,10,10\n5,5,10,10\n"), "not four numbers"),
    "NaN": (break_("5,5,10,10\n5,5,10,10\nnan,nan,nan,nan\n"), r"line 3 of .* is no box"),
    "three numbers": (break_("5,5,10\n" * 3), "not four numbers"),
    "absent at first": (lambda f: (f / "full_occlusion.txt").write_text("1,0,0", "utf-8"), "marked as absent"),
    "flags too short": (lambda f: (f / "out_of_view.txt").write_text("0,0", "utf-8"), "says 2 frames"),
    "flags of text": (lambda f: (f / "out_of_view.txt").write_text("0,0,yes", "utf-8"), "0 or 1 per frame"),
    "no text": (lambda f: (f / "groundtruth.txt").write_bytes(b"\xff\xfe\x00\x01"), "cannot read"),
    "no frames": (lambda f: shutil.rmtree(f / "img"), "has no frames"),
    "empty img": (lambda f: [p.unlink() for p in (f / "img").iterdir()], "no frames in"),
    "another size": (lambda f: Image.new("RGB", (41, 30)).save(f / "img/00000002.jpg"), "different sizes"),
    "damaged": (lambda f: (f / "img/00000002.jpg").write_bytes(b"\xff\xd8no"), "cannot read the photo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_work(tmp_path, name):
    spoil, words = WRONG[name]
    sequence(tmp_path / "good")
    spoil(sequence(tmp_path / "spoilt"))
    with pytest.raises(DataError, match=words) as error:
        read_sequences(tmp_path)
    assert "spoilt" in str(error.value)


def test_no_sequences(tmp_path):
    with pytest.raises(DataError, match="no folder at"):
        read_sequences(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no sequence in"):
        read_sequences(tmp_path)


def test_generated_sequences_follow_from_their_seed(tmp_path):
    """The same bytes twice; targets move, change size, are covered and leave; the folder is whole or absent."""
    options = dict(sequences=5, frames=40, size=(72, 96))
    first = generate_sequences(tmp_path / "a", **options)
    generate_sequences(tmp_path / "b", **options)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert all((tmp_path / "b" / name).read_bytes() == (first / name).read_bytes() for name in names)
    found = read_sequences(first)
    assert [len(s) for s in found] == [40] * 5
    assert sum((~s.visible).sum() for s in found) > 0
    travelled = [np.ptp(s.truth[s.visible, :2], axis=0).max() for s in found]
    assert min(travelled) > 5
    assert max(np.ptp(s.truth[s.visible, 2]) for s in found) > 4
    other = generate_sequences(tmp_path / "a", **options | {"seed": 1}, overwrite=True)
    assert any((tmp_path / "b" / n).read_bytes() != (other / n).read_bytes() for n in names if n.suffix == ".jpg")
    assert 0.02 < evaluate_tracker(FirstBox(), found).auc < 0.7


def test_generating_never_destroys(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.txt").write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match="exists"):
        generate_sequences(tmp_path / "mine")
    with pytest.raises(ConfigError, match="at least one"):
        generate_sequences(tmp_path / "new", sequences=0)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_sequences(tmp_path / "new", sequences=1, frames=2)
    monkeypatch.setattr(Image.Image, "save", _full)
    with pytest.raises(TinyMIMError, match="cannot write"):
        generate_sequences(tmp_path / "new", sequences=1, frames=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def _full(*_, **__):
    raise OSError(28, "No space left on device")
