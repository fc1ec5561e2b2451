"""Photos in .tar shards: packed, found, read in place; and what hostile, damaged and foreign shards do."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attack.kills import logged, write_data
from tests.export.photographs import photograph, write_photos
from tinymim import cli
from tinymim.data import photo_files
from tinymim.data.imagenet import read_class_folder
from tinymim.data.pack import pack
from tinymim.data.photo_files import list_photos
from tinymim.data.photos import Photos
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.data.shards import read_shard
from tinymim.engine import distill, finetune, pretrain
from tinymim.errors import ConfigError, DataError
from tinymim_export.precision.calibrate import choose_photos

TINY = {"student_args": dict(depth=2, embed_dim=24, num_heads=2)}
RUN = dict(img_size=32, batch_size=4, max_steps=4, save_every=2, workers=0, device="cpu")
ODD = ["b/z.png", "b.c/a.png", "b/é ü.png", "a/.hidden.png", "top.png", "b/" + "long" * 40 + ".png"]


@pytest.fixture(autouse=True)
def said(capsys):
    photo_files.print_once.cache_clear()
    return lambda: capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """Photos with odd names, a damaged one, and one that a name with bytes that are no UTF-8 has."""
    for i, name in enumerate([*ODD, os.fsdecode(b"q\xff.png")]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i).save(path, format="PNG")
    (tmp_path / "photos/b/damaged.jpg").write_bytes(b"\xff\xd8\xff no photo")
    return tmp_path / "photos"


def write_tar(path, members):
    """A tar of (name or TarInfo, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png(seed=0):
    file = io.BytesIO()
    photograph(seed).save(file, "PNG")
    return file.getvalue()


def special(name, kind, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_packed_photos_are_those_of_the_folder_in_its_order(folder, tmp_path):
    done = pack(folder, tmp_path / "shards", max_size=40_000)
    loose, packed = list_photos(folder), list_photos(done.out)
    assert done.shards > 1
    assert [str(path.relative_to(folder)) for path in loose] == [
        str(path.relative_to(done.out)).partition("/")[2] for path in packed
    ]
    assert list_photos(f"{done.out}/photos-{{00000..{done.shards - 1:05d}}}.tar") == packed
    for kind in ("whole", "crop"):
        one, two = (Photos(paths, img_size=32, jitter=0.4, decode=kind) for paths in (loose, packed))
        for i in range(len(loose)):
            a, b = one[(3, i)], two[(3, i)]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["student_image"], b["student_image"])
            assert len(a["skipped"]) == len(b["skipped"]) == (loose[i].name == "damaged.jpg")
    with tarfile.open(sorted(done.out.glob("*.tar"))[0]) as tar:  # as any other reader sees it
        assert tar.extractfile("b/damaged.jpg").read() == (folder / "b/damaged.jpg").read_bytes()
    again = pack(done.out, tmp_path / "again", max_size=40_000)
    assert [p.read_bytes() for p in sorted(again.out.glob("*.tar"))] == [
        p.read_bytes() for p in sorted(done.out.glob("*.tar"))
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_smaller_photos(tmp_path):
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(0, (600, 400)).save(tmp_path / "photos/large.jpg", exif=exif, quality=95)
    photograph(1, (600, 400)).save(tmp_path / "photos/large.png")
    photograph(2, (60, 90)).save(tmp_path / "photos/small.png")
    (tmp_path / "photos/broken.jpg").write_bytes(b"no photo")
    done = pack(tmp_path / "photos", tmp_path / "shards", img_size=200)
    assert [os.path.basename(path) for path in done.left_out] == ["broken.jpg"]
    photos = {path.name: open_photo(path) for path in list_photos(done.out)}
    assert {name: photo.size for name, photo in photos.items()} == {
        "large.jpg": (200, 133),  # upright
        "large.png.jpg": (133, 200),
        "small.png": (90, 60),
    }
    assert np.array_equal(np.asarray(photos["small.png"]), np.asarray(photograph(2, (60, 90))))
    wanted = open_photo(tmp_path / "photos/large.jpg").resize((200, 133), Image.Resampling.LANCZOS)
    assert abs(np.asarray(photos["large.jpg"], int) - np.asarray(wanted)).mean() < 4


@pytest.mark.parametrize("verb", [pytest.param("pretrain", marks=pytest.mark.slow), "distill", "finetune"])
def test_a_run_on_shards_is_the_run_on_the_folder(verb, tmp_path):
    """The same losses; and a run that was stopped on the folder goes on, on the shards, to the same weights."""
    write_data(tmp_path)
    photos, shards = tmp_path / "photos/train", pack(tmp_path / "photos/train", tmp_path / "shards").out
    val = pack(tmp_path / "photos/val", tmp_path / "val_shards").out
    decoder = {"decoder": dict(dim=16, depth=1, heads=2)}
    more = {"pretrain": decoder, "finetune": {"drop_path": 0.1}}.get(verb, {})
    common = dict(RUN, val_data=tmp_path / "photos/val", cfg_options=TINY | more)
    if verb == "distill":
        teacher = pretrain(
            "mae_tiny", **RUN | dict(max_steps=1), data=photos, out=tmp_path / "t", cfg_options=TINY | decoder
        )
        common["teacher"] = str(teacher.student)
    job = dict(pretrain=pretrain, distill=distill, finetune=finetune)[verb]
    loose = job(**common, data=photos, out=tmp_path / "loose")
    packed = job(**common | dict(data=shards, val_data=val), out=tmp_path / "packed")
    assert logged(loose.metrics) == logged(packed.metrics)
    name = "classifier.pth" if verb == "finetune" else "student.pth"
    whole = (tmp_path / "loose" / name).read_bytes()
    (tmp_path / "loose/checkpoints/step_00000004.pth").unlink()
    job(**common | dict(data=shards, val_data=val), out=tmp_path / "loose", resume=True)
    assert (tmp_path / "loose" / name).read_bytes() == whole
    data = json.loads((tmp_path / "packed/env.json").read_text())["inputs"]["data"]
    assert (data["folder"], data["files"]) == ("shards", 12)


def test_classes_and_calibration_photos_are_found_in_shards(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        write_photos(tmp_path / "classes" / name, 3, first=len(name))
    write_photos(tmp_path / "classes", 1)  # counts in no class
    shards = pack(tmp_path / "classes", tmp_path / "shards", max_size=1).out
    loose, packed = read_class_folder(tmp_path / "classes"), read_class_folder(shards)
    assert (loose.classes, loose.labels.tolist()) == (packed.classes, packed.labels.tolist())
    assert [path.name for path in loose.files] == [path.name for path in packed.files]
    chosen, same = choose_photos(shards, 5), choose_photos(tmp_path / "classes", 5)
    assert [digest for _, digest in chosen.files] == [digest for _, digest in same.files]
    pattern = f"{shards}/{{{','.join(sorted(p.name for p in shards.glob('*.tar')))}}}"
    assert sorted(choose_photos(pattern, 5).files) == sorted(chosen.files)


def test_classes_of_webdataset_are_in_files_of_their_own(tmp_path):
    members = [
        (f"{i:03d}.{kind}", content)
        for i, c in enumerate([10, 2, 2])
        for kind, content in (("png", png(i)), ("cls", b"%d" % c))
    ]
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds/a.tar", [*members, ("000.json", b"{}")])
    read = read_class_folder(tmp_path / "wds")
    assert (read.classes, read.labels.tolist()) == (["2", "10"], [0, 0, 1])
    write_tar(tmp_path / "wds/a.tar", [("000.png", png())])
    with pytest.raises(DataError, match=r"does not say the class of 000\.png"):
        read_class_folder(tmp_path / "wds")


def test_hostile_members_are_names_and_nothing_else(tmp_path, said):
    (tmp_path / "secret.png").write_bytes(png(9))
    members = [
        ("../secret.png", png(1)),
        ("/etc/x.png", png(1)),
        ("a/../../x.png", png(1)),
        ("./dotted.png", png(2)),
        (special("link.png", tarfile.SYMTYPE, "../secret.png"), b""),
        (special("hard.png", tarfile.LNKTYPE, "../secret.png"), b""),
        (special("pipe.png", tarfile.FIFOTYPE), b""),
        (special("device.png", tarfile.CHRTYPE), b""),
        ("twice.png", b"damaged"),
        ("twice.png", png(3)),
        (".hidden.png", png(4)),
        ("notes.txt", b"no photo"),
    ]
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds/a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    photos = list_photos(tmp_path / "wds")
    assert [path.name for path in photos] == ["dotted.png", "twice.png"]
    assert np.array_equal(np.asarray(open_photo(photos[1])), np.asarray(photograph(3)))
    assert "passed over 7 members" in said()
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == [tmp_path / "wds/.a.tar.index"]
    for name in ("nothing.png", "../secret.png", "link.png"):
        with pytest.raises(UnreadablePhoto):
            open_photo(f"{tmp_path}/wds/a.tar/{name}")


@pytest.mark.parametrize("bytes_kept", [0, 100, 512, 1000, 5000, -1024, -9000])
def test_a_shard_that_is_cut_is_refused_before_work_starts(bytes_kept, tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(3)]).read_bytes()
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    (tmp_path / "a.tar").write_bytes(whole[: end + 1024 + bytes_kept if bytes_kept < 0 else bytes_kept])
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        list_photos(tmp_path / "a.tar")


def test_damaged_bytes_never_do_worse_than_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(2)]).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        spoilt = bytearray(whole)
        for at in rng.integers(0, 512 if i % 2 else len(whole), 3):
            spoilt[at] = rng.integers(0, 256)
        path = tmp_path / f"{i}.tar"
        path.write_bytes(spoilt)
        try:
            for photo in list_photos(path):
                open_photo(photo)
        except DataError:  # UnreadablePhoto is one
            pass


def test_the_index_is_read_again_and_never_trusted(tmp_path, monkeypatch):
    shard = str(write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1))]))
    index = tmp_path / ".a.tar.index"
    read_shard(shard)
    good = index.read_text("utf-8")
    from tinymim.data import shards

    scans = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda *a: scans.append(1) or scan(*a))

    def names():
        shards._read_shard.cache_clear()
        return read_shard(shard).names

    assert (names(), len(scans)) == (["0.png", "1.png"], 0)
    value = json.loads(good)
    for spoilt in ("", "[]", good[:-20], *(json.dumps(value | more) for more in (
        {"names": ["../x.png", "1.png"]}, {"names": ["1.png", "0.png"]}, {"sizes": [1]}, {"offsets": [-1, 2]},
        {"offsets": [2**60, 2**63]}, {"stamp": "1 2"},
    ))):  # fmt: skip
        index.write_text(spoilt, "utf-8")
        found = names()
        assert found == ["0.png", "1.png"]
        assert index.read_text("utf-8") == good
    lying = value | {"offsets": [2**50, 0]}  # of this shard's size and date: what it gives is no photo
    index.write_text(json.dumps(lying), "utf-8")
    assert len(names()) == 2
    for name in ("0.png", "1.png"):
        with pytest.raises(UnreadablePhoto):
            open_photo(f"{shard}/{name}")
    write_tar(tmp_path / "a.tar", [("2.png", png(0))])  # another shard of this name
    assert names() == ["2.png"]
    held = read_shard(shard)
    write_tar(tmp_path / "a.tar", [("3.png", png(0)), ("4.png", png(0))])
    with pytest.raises(OSError, match="changed while it was in use"):
        held.read("2.png")


def test_a_place_that_is_only_read_needs_no_index_on_disk(tmp_path, monkeypatch):
    from tinymim.data import shards
    from tinymim.errors import TinyMIMError

    def refuse(*_):
        raise TinyMIMError("cannot write", "read-only", "")

    monkeypatch.setattr(shards, "write_json", refuse)
    assert len(list_photos(write_tar(tmp_path / "a.tar", [("0.png", png(0))]))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_what_is_a_folder_of_shards(tmp_path, said):
    """Only .tar files; beside photos or folders they are passed over, which is told; compressed ones are said."""
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "a.tar", [("0.png", png(0))])
    (data / "README.md").write_text("about")
    assert len(list_photos(data)) == 1
    write_photos(data, 2)
    assert [path.name for path in list_photos(data)] == ["0.png", "1.png"]
    assert "passed over .tar files" in said()
    (tmp_path / "zipped").mkdir()
    subprocess.run(["gzip", data / "a.tar"], check=True)
    (data / "a.tar.gz").rename(tmp_path / "zipped/a.tar.gz")
    with pytest.raises(DataError, match="gunzip"):
        list_photos(tmp_path / "zipped")
    with pytest.raises(DataError, match=r"no shard at .*x-001.tar"):
        list_photos(tmp_path / "x-{001..003}.tar")
    with pytest.raises(DataError, match="too many shards"):
        list_photos(tmp_path / "{0..9999}{0..9999}.tar")


def test_doors_that_read_no_shards_say_so(tmp_path):
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds/a.tar", [("0.png", png(0))])
    from tinymim.data.imagenet import check_layout
    from tinymim_export.runtime.predict import _jobs

    with pytest.raises(DataError, match="tar -xf"):
        _jobs(tmp_path / "wds", tmp_path / "masks")
    with pytest.raises(DataError, match="tar -xf"):
        check_layout(tmp_path / "wds", "imagenet")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--pack is missing"),
        (["--pack", "PHOTOS"], "--out is missing"),
        (["--pack", "PHOTOS", "--out", "PHOTOS/in"], "is inside"),
        (["--pack", "PHOTOS", "--out", "USED"], "is there already"),
        (["--pack", "PHOTOS", "--out", "new", "--max-size", "much"], "--max-size much"),
        (["--pack", "PHOTOS", "--out", "new", "--max-size", "0"], "--max-size 0"),
        (["--pack", "PHOTOS", "--out", "new", "--quality", "90"], "--img-size"),
        (["--pack", "PHOTOS", "--out", "new", "--img-size", "4"], "--img-size 4"),
        (["--pack", "PHOTOS", "--out", "new", "--img-size", "64", "--quality", "0"], "--quality 0"),
        (["--pack", "EMPTY", "--out", "new"], "no photos in"),
    ],
)
def test_what_cannot_be_packed_is_said_and_nothing_is_left(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("PHOTOS", "USED", "EMPTY"):
        os.mkdir(name)
    write_photos(Path("PHOTOS"), 2)
    Path("USED/file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["data", *words]) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_packing_is_all_or_nothing(tmp_path, monkeypatch):
    """A disk that fails while writing, or gives back other bytes: no shards; what a killed pack left is used up."""
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos", 3)
    (tmp_path / ".shards.part/new").mkdir(parents=True)
    (tmp_path / ".shards.part/new/photos-00000.tar").write_bytes(b"half")
    from tinymim.data import pack as packing

    def spoil(shards, digests):
        path = shards[0]
        path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX", 1))
        check(shards, digests)

    check = packing._verify
    monkeypatch.setattr(packing, "_verify", spoil)
    with pytest.raises(DataError, match="not in the shards as it was written"):
        pack(tmp_path / "photos", tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is there already"):
        pack(tmp_path / "photos", pack(tmp_path / "photos", tmp_path / "shards").out)
