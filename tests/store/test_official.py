"""TinyViT's published format: files as its code writes them (facts of its layout in the module), read and written."""

import json
import shutil
import struct

import numpy as np
import pytest

from tinymim.cli import main
from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.store import official
from tinymim.store.layout import logits_arrays
from tinymim.store.official import read_official, write_official
from tinymim.store.targets import TargetStore
from tinymim.store.writer import TargetWriter

K, CLASSES, EPOCHS = 4, 21, 2
KEYS = [f"n{i % 3}/{i}.JPEG" for i in range(9)]


def record(epoch, i):
    ids = [(i + 5 * j) % CLASSES for j in range(K)]
    return 10**6 * epoch + i, ids, [0.5, 0.2, 0.1, 0.05 / (epoch + 1)]


def write_files(folder, ranks=2, keys=KEYS, topk=K):
    """As TinyViT writes them: packed by struct, records dealt to the ranks in a shuffled order."""
    for epoch in range(EPOCHS):
        here = folder / f"logits_top{topk}_epoch{epoch}"
        here.mkdir(parents=True)
        order = np.random.default_rng(epoch).permutation(len(keys))
        for rank in range(ranks):
            mine = order[rank::ranks]
            (here / f"rank{rank}-keys.txt").write_text("".join(f"{keys[i]}\n" for i in mine), "utf-8")
            values = b"".join(
                struct.pack(f"<i{topk}h{topk}e", seed, *ids, *p)
                for seed, ids, p in (record(epoch, int(i)) for i in mine)
            )
            (here / f"rank{rank}-values.bin").write_bytes(values)
    return folder


def check_store(store):
    assert len(store) == 9 * EPOCHS
    for epoch in range(EPOCHS):
        for i, key in enumerate(KEYS):
            seed, ids, values = record(epoch, i)
            found = store[key, epoch]
            assert found["seed"] == seed
            np.testing.assert_array_equal(found["indices"], ids)
            np.testing.assert_array_equal(found["values"], np.array(values, np.float16))


@pytest.mark.parametrize("ranks", [1, 3])
def test_their_files_become_a_store(ranks, tmp_path, capsys):
    folder = write_files(tmp_path / "theirs", ranks)
    given = ["cache", "--from-official", str(folder), "--out", str(tmp_path / "s"), "--classes", str(CLASSES)]
    assert main([*given, "--teacher", "clip"]) == 0
    store = TargetStore.open(tmp_path / "s")
    check_store(store)
    assert store.header["topk"] == K
    assert store.header["teacher"] == {"name": "clip", "sha256": None}
    assert main(["cache", "--out", str(tmp_path / "s"), "--check", "--data", str(tmp_path)]) == 2
    assert "TinyViT's published augmentation" in capsys.readouterr().err


def test_a_store_becomes_their_files_and_a_store_again(tmp_path):
    read_official(write_files(tmp_path / "theirs"), tmp_path / "s", classes=CLASSES, teacher="clip")
    (one, two) = write_official(tmp_path / "s", tmp_path / "ours")
    assert sorted(path.name for path in one.iterdir()) == ["rank0-keys.txt", "rank0-values.bin"]
    assert (two / "rank0-values.bin").stat().st_size == 9 * (4 + 4 * K)
    keys, values = (one / "rank0-keys.txt").read_text("utf-8").splitlines(), (one / "rank0-values.bin").read_bytes()
    for at, key in enumerate(keys):  # read by struct, not by our code
        seed, ids, p = record(0, KEYS.index(key))
        assert struct.unpack_from(f"<i{K}h", values, at * (4 + 4 * K)) == (seed, *ids)
        np.testing.assert_allclose(struct.unpack_from(f"<{K}e", values, at * (4 + 4 * K) + 4 + 2 * K), p, rtol=1e-3)
    for target in ("again", "again"):  # the second time it is there
        read_official(tmp_path / "ours", tmp_path / target)
    for path in (tmp_path / "s").rglob("*.safetensors"):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "s")).read_bytes() == path.read_bytes()
    shutil.rmtree(two)
    assert write_official(tmp_path / "s", tmp_path / "ours") == [one, two]
    (tmp_path / "other/x").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty"):
        write_official(tmp_path / "s", tmp_path / "other")


def flip(path, at, content):
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + content + whole[at + len(content) :])


RECORD = 4 + 4 * K
WRONG = {
    "a missing rank": (
        lambda e: [(e / f"rank1-{part}").unlink() for part in ("keys.txt", "values.bin")],
        "epoch1 is of other",
    ),
    "a missing rank before the last": (lambda e: (e / "rank0-values.bin").unlink(), "rank0-values.bin is missing"),
    "missing keys": (lambda e: (e / "rank1-keys.txt").unlink(), "rank1-keys.txt is missing"),
    "truncated values": (lambda e: flip_end(e / "rank1-values.bin", 1), "has 79 bytes"),
    "a whole record less": (lambda e: flip_end(e / "rank1-values.bin", RECORD), "has 60 bytes"),
    "empty values": (lambda e: (e / "rank0-values.bin").write_bytes(b""), "has 0 bytes"),
    "another K in the name": (lambda e: e.rename(e.with_name("logits_top9_epoch1")), "of K 4, 9"),
    "a missing epoch": (lambda e: e.rename(e.with_name("logits_top4_epoch5")), "epoch 1 is missing"),
    "a key twice in a file": (lambda e: double(e / "rank0-keys.txt", e / "rank0-keys.txt"), "occurs twice"),
    "a key on two ranks": (lambda e: double(e / "rank0-keys.txt", e / "rank1-keys.txt"), "occurs twice"),
    "another key": (lambda e: replace_first(e / "rank0-keys.txt", "other.JPEG"), "is of other photos than"),
    "a class too large": (lambda e: flip(e / "rank0-values.bin", 4, b"\x15\x00"), "names the class 21"),
    "a class that has wrapped around": (
        lambda e: flip(e / "rank0-values.bin", 4, b"\xff\xff"),
        "names the class 65,535",
    ),
    "no probability": (lambda e: flip(e / "rank0-values.bin", 4 + 2 * K, b"\x00\x7e"), "holds no probabilities"),
    "a negative probability": (
        lambda e: flip(e / "rank0-values.bin", 4 + 2 * K, b"\x00\xb8"),
        "holds no probabilities",
    ),
    "a sum above 1": (lambda e: flip(e / "rank0-values.bin", 4 + 2 * K, b"\x00\x3c"), "holds no probabilities"),
}


def flip_end(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def double(source, target):
    first = source.read_text("utf-8").splitlines()[0]
    lines = target.read_text("utf-8").splitlines()
    target.write_text("\n".join([*lines[:-1], first]) + "\n", "utf-8")


def replace_first(path, key):
    path.write_text("\n".join([key, *path.read_text("utf-8").splitlines()[1:]]) + "\n", "utf-8")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_their_files_is_said(name, tmp_path):
    act, why = WRONG[name]
    act(write_files(tmp_path / "theirs") / "logits_top4_epoch1")
    with pytest.raises(TinyMIMError, match=why) as told:
        read_official(tmp_path / "theirs", tmp_path / "s", classes=CLASSES)
    assert isinstance(told.value, DataError)
    with pytest.raises(DataError):
        TargetStore.open(tmp_path / "s")  # it is not taken for a whole one


def test_padding_of_a_sampler_is_accepted_when_asked_for(tmp_path):
    folder = write_files(tmp_path / "theirs")
    for epoch in range(EPOCHS):
        here = folder / f"logits_top4_epoch{epoch}"
        first = (here / "rank0-keys.txt").read_text("utf-8").splitlines()[0]
        with (
            open(here / "rank1-keys.txt", "a", encoding="utf-8") as keys,
            open(here / "rank1-values.bin", "ab") as values,
        ):
            keys.write(first + "\n")
            values.write(struct.pack(f"<i{K}h{K}e", 5, *range(K), *[0.1] * K))
    with pytest.raises(DataError, match="--keep-first"):
        read_official(folder, tmp_path / "s", classes=CLASSES)
    read_official(folder, tmp_path / "s", classes=CLASSES, keep_first=True)
    check_store(TargetStore.open(tmp_path / "s"))


def test_what_their_files_do_not_say_is_asked_for(tmp_path, capsys):
    folder = write_files(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="how many classes"):
        read_official(folder, tmp_path / "s")
    with pytest.raises(DataError, match="of another K"):
        read_official(folder, tmp_path / "s", classes=CLASSES, topk=3)
    with pytest.raises(DataError, match=r"'new.JPEG' is in --data and not in"):
        read_official(folder, tmp_path / "s", classes=CLASSES, keys=[*KEYS, "new.JPEG"])
    with pytest.raises(DataError, match=r"'n0/0.JPEG' is in .*theirs and not in --data"):
        read_official(folder, tmp_path / "s", classes=CLASSES, keys=KEYS[1:])
    with pytest.raises(DataError, match="no folder in it"):
        read_official(tmp_path, tmp_path / "s", classes=CLASSES)
    assert not (tmp_path / "s").exists()
    assert main(["cache", "--out", str(folder)]) == 2
    assert "--from-official" in capsys.readouterr().err


def test_what_their_format_cannot_hold(tmp_path):
    for name, keys, classes, why in (("a", ["x"], 2**15 + 1, "int16 ids"), ("b", ["x\ny"], 10, "one key a line")):
        about = {"topk": 1, "classes": classes}
        with TargetWriter(tmp_path / name, keys, arrays=logits_arrays(1), epochs=1, about=about) as into:
            for chunk in into.work():
                into.write(
                    chunk, {"seed": np.zeros(1, int), "values": np.zeros((1, 1)), "indices": np.zeros((1, 1), int)}
                )
        with pytest.raises(ConfigError, match=why):
            write_official(tmp_path / name, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_the_sidecar_is_checked(tmp_path):
    read_official(write_files(tmp_path / "theirs"), tmp_path / "s", classes=CLASSES)
    write_official(tmp_path / "s", tmp_path / "ours")
    path = tmp_path / "ours" / official.SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"classes": "many"}), "utf-8")
    with pytest.raises(DataError, match="classes is 'many'"):
        read_official(tmp_path / "ours", tmp_path / "t")
