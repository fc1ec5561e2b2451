"""The container: what is written is read back, from several places, by several processes; damage is refused."""

import json
import os
import pickle
import resource
import time

import fsspec
import numpy as np
import pytest

from tests.attack.forked import child, fork
from tinymim.data.replay import pairs
from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.store import places
from tinymim.store.layout import Array, logits_arrays
from tinymim.store.targets import TargetStore
from tinymim.store.writer import TargetWriter

K = 3
KEYS = [f"{folder}/{name}.jpg" for folder in ("b", "a", "a-b", "a/b") for name in ("0", "10", "9", "é")]
ABOUT = {"topk": K, "classes": 10, "teacher": {"name": "t", "sha256": "0" * 64}, "augmentation": {"mixup": 0.0}}


def writer(url, keys=KEYS, **changes):
    given = dict(arrays=logits_arrays(K), epochs=3, chunk=6, seed=7, about=ABOUT) | changes
    return TargetWriter(url, keys, **given)


def record(epoch, position):
    """The made-up record of a photo."""
    values = np.array([0.5, 0.25, 0.125]) / (epoch + 1)
    return {"seed": 1000 * epoch + position, "values": values, "indices": np.array([position % 10, 8, 9])}


def fill(into, part=None, most=99):
    """Write free chunks; their names."""
    done = []
    for chunk in into.work(part):
        if len(done) == most:
            break
        rows = [record(chunk.epoch, int(position)) for position in into.layout.photos_of(chunk)]
        into.write(chunk, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
        done.append(chunk.name)
    return done


def make(url, **changes):
    with writer(url, **changes) as into:
        fill(into)
    return TargetStore.open(url)


def check_all(store):
    assert len(store) == len(store.keys) * 3
    assert [*store.keys] == sorted(store.keys, key=lambda key: key.encode("utf-8", "surrogateescape"))
    for epoch in range(3):
        for position, key in enumerate(store.keys):
            found, wanted = store[key, epoch], record(epoch, position)
            assert found["seed"] == wanted["seed"]
            assert found["values"].dtype == np.float16
            assert found["indices"].dtype == np.uint16
            np.testing.assert_array_equal(found["values"], wanted["values"].astype(np.float16))
            np.testing.assert_array_equal(found["indices"], wanted["indices"])


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_written_is_read_back(kind, mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = {"folder": tmp_path / "s", "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}-{mixed}"}[
        kind
    ]
    store = make(url, pairs=mixed)
    check_all(store)
    check_all(pickle.loads(pickle.dumps(store)))
    assert len(pickle.dumps(store)) < 400
    assert KEYS[3] in store
    assert "c/0.jpg" not in store
    assert store.header["format"] == "tinymim.targets"
    assert store.header["topk"] == K
    assert store.layout.record_bytes == 4 + 4 * K
    if kind != "memory":
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["chunks", "keys.safetensors", "store.json"]
    else:
        assert sorted((tmp_path / "cache").rglob("*.safetensors")), "remote chunks are copied before they are mapped"


def test_a_pair_lies_in_one_chunk_in_the_order_of_replay(tmp_path):
    layout = make(tmp_path / "s", pairs=True).layout
    for epoch in range(3):
        np.testing.assert_array_equal(layout.order(epoch), pairs(len(KEYS), 7, epoch))
    assert writer(tmp_path / "t", chunk=5).layout.chunk == 6


def test_a_record_holds_any_arrays(tmp_path):
    """What other kinds of targets need: shapes, several types, a scalar."""
    rng = np.random.default_rng(0)
    arrays = [Array("q", "int8", (4, 5)), Array("scale", "float32"), Array("seed", "int32")]
    given = {"q": rng.integers(-128, 128, (2, 4, 5)), "scale": rng.random(2), "seed": np.array([1, 2])}
    with TargetWriter(tmp_path / "s", ["b", "a"], arrays=arrays, epochs=1, kind="relations") as into:
        (chunk,) = into.work()
        into.write(chunk, given)
    store = TargetStore.open(tmp_path / "s")
    np.testing.assert_array_equal(store["b", 0]["q"], given["q"][1])
    assert store["a", 0]["scale"] == np.float32(given["scale"][0])


def test_names_of_any_bytes_are_keys(tmp_path):
    keys = [os.fsdecode(b"caf\xe9.jpg"), "café.jpg", "z\n.jpg", "Z.jpg"]
    store = make(tmp_path / "s", keys=keys)
    check_all(store)
    assert all(key in store for key in keys)


def test_a_default_chunk_is_at_most_16_mib(tmp_path):
    assert writer(tmp_path / "a", chunk=None).layout.chunk == 4096
    big = [Array("relations", "float16", (1024, 1024))]
    assert TargetWriter(tmp_path / "b", KEYS, arrays=big, epochs=1).layout.chunk == 8


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    make(tmp_path / "s")
    for path, read in (
        (tmp_path / "s/chunks/00001/000001.safetensors", lambda store: store[store.keys[6], 1]),
        (tmp_path / "s/keys.safetensors", lambda store: store[store.keys[0], 0]),
    ):
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at // 3 % 8]) + whole[at + 1 :])
            with pytest.raises(DataError, match=r"damaged|does not belong"):
                read(TargetStore.open(tmp_path / "s", partial=True))
        for length in (0, 4, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match="damaged"):
                read(TargetStore.open(tmp_path / "s", partial=True))
        path.write_bytes(whole)
        read(TargetStore.open(tmp_path / "s"))


def test_a_damaged_header_is_our_error(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s/store.json"
    header = json.loads(path.read_text("utf-8"))
    for change in ({"chunk": 0}, {"format": "x"}, {"version": 2}, {"photos": 2**40}, {"arrays": []}, {"epochs": "3"}):
        path.write_text(json.dumps(header | change), "utf-8")
        with pytest.raises(DataError, match="cannot use"):
            TargetStore.open(tmp_path / "s")
    for array in ({"name": "seed", "dtype": "object", "shape": []}, header["arrays"][1]):
        path.write_text(json.dumps(header | {"arrays": [array, header["arrays"][1]]}), "utf-8")
        with pytest.raises(DataError, match=r"type 'object'|twice"):
            TargetStore.open(tmp_path / "s")


def test_chunks_of_other_places_are_refused(tmp_path):
    make(tmp_path / "s")
    make(tmp_path / "t", seed=8)
    chunks = tmp_path / "s/chunks"
    here = chunks / "00000/000000.safetensors"
    for source in (chunks / "00001/000000.safetensors", tmp_path / "t/chunks/00000/000000.safetensors"):
        here.write_bytes(source.read_bytes())
        with pytest.raises(DataError, match="does not belong here"):
            TargetStore.open(tmp_path / "s")[sorted(KEYS)[0], 0]


def test_what_a_store_does_not_hold_is_our_error(tmp_path):
    store = make(tmp_path / "s")
    for key, why in (
        (("c.jpg", 0), "16 other photos"),
        ((KEYS[0], 3), "epochs 0 to 2"),
        ((KEYS[0], -1), "epochs 0 to 2"),
    ):
        with pytest.raises(DataError, match=why):
            store[key]
    (tmp_path / "s/chunks/00002/000001.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 of 9 chunks are missing, the first is chunks/00002/000001"):
        TargetStore.open(tmp_path / "s")
    with pytest.raises(DataError, match=r"there is no store\.json"):
        TargetStore.open(tmp_path)
    for url in ("nonsense://x", "s3a-unknown://x"):
        with pytest.raises(ConfigError, match="cannot open"):
            TargetStore.open(url)


def test_another_store_is_not_continued(tmp_path):
    make(tmp_path / "s")
    other = [*KEYS[:-1], "new.jpg"]
    for changes, word in (
        (dict(seed=8), r"seed \(7, not 8\)"),
        (dict(chunk=8), r"chunk \(6, not 8\)"),
        (dict(keys=other), "photos"),
        (dict(keys=KEYS[1:]), r"photos \(16, not 15\)"),
        (dict(about=ABOUT | {"classes": 11}), r"classes \(10, not 11\)"),
        (dict(about=ABOUT | {"augmentation": {"mixup": 0.8}}), r"augmentation.mixup \(0.0, not 0.8\)"),
        (dict(about=ABOUT | {"teacher": {"name": "t", "sha256": "1" * 64}}), r"teacher.sha256"),
        (dict(arrays=logits_arrays(4), about=ABOUT | {"topk": 4}), r"topk \(3, not 4\)"),
    ):
        with pytest.raises(ConfigError, match=word):
            writer(tmp_path / "s", **changes)
    with pytest.raises(DataError, match="occurs twice"):
        writer(tmp_path / "t", keys=[*KEYS, KEYS[0]])
    assert not (tmp_path / "t").exists()
    check_all(TargetStore.open(tmp_path / "s"))


def test_epochs_are_added(tmp_path):
    make(tmp_path / "s", epochs=2)
    with writer(tmp_path / "s", chunk=None) as into:
        assert {name.split("/")[1] for name in fill(into)} == {"00002"}
    check_all(TargetStore.open(tmp_path / "s"))
    assert writer(tmp_path / "s", epochs=1).layout.epochs == 3, "none is taken away"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("indices", 65_536, "65536 is beyond 65,535"),
        ("indices", -1, "-1 is beyond"),
        ("indices", 1.5, "whole numbers"),
        ("values", np.nan, "NaN"),
        ("values", 1e6, "beyond"),
        ("seed", 2**31, "beyond 2,147,483,647"),
    ],
)
def test_what_a_type_cannot_hold_is_not_stored(name, value, why, tmp_path):
    with writer(tmp_path / "s") as into:
        chunk = next(into.work())
        shape = {"seed": (6,), "values": (6, K), "indices": (6, K)}
        arrays = {key: np.zeros(size, np.float64 if key == "values" else np.int64) for key, size in shape.items()}
        with pytest.raises(DataError, match=why):
            into.write(chunk, arrays | {name: np.full(shape[name], value)})
        with pytest.raises(DataError, match="has the shape"):
            into.write(chunk, arrays | {name: np.zeros((5, *shape[name][1:]))})
        with pytest.raises(DataError, match="holds seed, values, indices"):
            into.write(chunk, {"seed": arrays["seed"]})
    assert not (tmp_path / "s/chunks").exists()


def test_several_processes_write_each_chunk_once(tmp_path):
    """They start together, so that claims collide; the chunks each wrote are in its log."""
    folder = tmp_path / "s"

    def act():
        with writer(folder, chunk=2) as into:
            print("\n".join(fill(into)))
        return 0

    pids = [child(act, tmp_path / f"{i}.log") for i in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    written = [line for i in range(4) for line in (tmp_path / f"{i}.log").read_text("utf-8").splitlines() if line]
    assert len(written) == len({*written}) == 3 * 8
    check_all(TargetStore.open(folder))
    assert not (folder / "claims").exists()


def test_parts_share_the_work_without_claims(tmp_path, monkeypatch):
    def none(*_):
        raise places.NoLocks("no locks", "a file system without", "--part")

    monkeypatch.setattr(places, "try_hold", none)
    with writer(tmp_path / "s") as into, pytest.raises(places.NoLocks):
        fill(into)
    done = []
    for part in range(2):
        with writer(tmp_path / "s") as into:
            done += fill(into, (part, 2))
    assert len(done) == len({*done}) == 9
    check_all(TargetStore.open(tmp_path / "s"))


def test_a_claim_ends_with_its_process(tmp_path):
    def killed():
        with writer(tmp_path / "s") as into:
            next(into.work())
            os.kill(os.getpid(), 9)

    assert fork(killed, tmp_path / "log") == -9
    assert os.listdir(tmp_path / "s/claims")
    with writer(tmp_path / "s") as into:
        assert len(fill(into)) == 9
    check_all(TargetStore.open(tmp_path / "s"))


def test_a_remote_claim_is_taken_over_when_it_is_old_or_its_process_dead(tmp_path):
    url = f"memory://{tmp_path.name}-claims"
    with writer(url) as into:
        path, fs = "claims/00000-000000", into.place.fs
        for note, left in (
            ({"pid": 1, "host": "elsewhere", "time": time.time()}, 8),
            ({"pid": 2**22 + 1, "host": places.HOST, "time": time.time()}, 9),
            ({"pid": 1, "host": "elsewhere", "time": time.time() - 1.01 * places.STALE}, 9),
        ):
            fs.pipe_file(f"{into.place.root}/{path}", json.dumps(note).encode())
            free = [into._claims[chunk] for chunk in into.work()]
            assert len(free) == left, note
            free[0]._renewed -= places.RENEW + 1
            free[0].renew()
            for claim in free:
                claim.release()
            into._claims.clear()


def test_copies_of_a_remote_store_are_replaced_and_limited(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}-copies"
    make(url)
    store = TargetStore.open(url, copies=tmp_path / "copies")
    check_all(store)
    copy = tmp_path / "copies/chunks/00000/000000.safetensors"
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + b"\xff")
    check_all(TargetStore.open(url, copies=tmp_path / "copies"))
    assert copy.read_bytes() == content, "a damaged copy is fetched again"
    monkeypatch.setattr(places, "CACHE_BYTES", 3 * len(content))
    for path in tmp_path.glob("copies/chunks/0000[01]/*"):
        os.utime(path, (1, 1))
    store.place.local("chunks/00000/000000.safetensors")
    store.place._make_room()
    assert {path.parent.name for path in tmp_path.glob("copies/chunks/*/*")} == {"00002"}
    fs = fsspec.filesystem("memory")
    fs.rm(f"/{tmp_path.name}-copies", recursive=True)
    make(url, seed=8)
    check_all(TargetStore.open(url, copies=tmp_path / "copies"))


def test_a_full_disk_is_our_error_and_loses_nothing(tmp_path):
    with writer(tmp_path / "s") as into:
        assert len(fill(into, most=2)) == 2

    def full():
        with writer(tmp_path / "s") as into:
            chunk = next(into.work())
            rows = len(chunk.rows)
            zeros = {"seed": np.zeros(rows, int), "values": np.zeros((rows, K)), "indices": np.zeros((rows, K), int)}
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            try:
                into.write(chunk, zeros)
            except TinyMIMError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                print(error)
                return 3
        return 0

    assert fork(full, tmp_path / "log") == 3
    assert "free some space" in (tmp_path / "log").read_text("utf-8")
    assert not [path for path in (tmp_path / "s").rglob(".*") if path.is_file()]
    with writer(tmp_path / "s") as into:
        assert len(fill(into)) == 7
    check_all(TargetStore.open(tmp_path / "s"))


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    for url in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(TinyMIMError, match=r"cannot (write|create)"):
            writer(url)
