"""Waiting for photos: said in the log and at the end, with what to type; and how many workers a machine gets."""

import json
import time

import pytest
from mmengine.config import Config

from tests.export.photographs import write_photos
from tinymim.data import photos as data
from tinymim.data.pack import pack
from tinymim.engine import hooks, pretrain, session

TINY = {"student_args": dict(depth=1, embed_dim=24, num_heads=2), "decoder": dict(dim=16, depth=1, heads=2)}


def test_a_run_that_waits_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos", 4)
    run = dict(img_size=32, batch_size=2, workers=0, device="cpu", epochs=12, cfg_options=TINY | {"watch_every": 0})
    pretrain("mae_tiny", **run | dict(epochs=3), data=tmp_path / "photos", out=tmp_path / "short")
    opened = data.open_crop
    monkeypatch.setattr(data, "open_crop", lambda *a: time.sleep(0.03) or opened(*a))
    result = pretrain("mae_tiny", **run, data=tmp_path / "photos", out=tmp_path / "slow")
    said = capsys.readouterr().out
    assert said.count("of the time was waiting for photos; try --workers 2, or smaller photos in shards (tinymim") == 1
    waits = [json.loads(line).get("data_wait") for line in result.metrics.read_text().splitlines()]
    assert len(waits) == 24
    assert waits[0] == 0  # the start of the data workers
    assert all(0.1 < wait <= 1 for wait in waits[1:])
    assert "data_wait" not in result.losses


def test_shares_of_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    waits, lately = hooks.Waits(), []
    for waited, lasted in ((5.0, 6.0), (0.5, 1.0), (0.0, 1.0), (1.0, 1.0), (0.5, 2.0)):
        now[0] += lasted
        waits.add(waited)
        if waits.steps % 2 == 0:
            lately.append(waits.lately())
    assert lately == [0, 0.25, 0.5]
    assert (waits.steps, waits.share()) == (4, 0.4)


@pytest.mark.parametrize(
    ("limits", "processes", "place", "workers"),
    [
        ({"machine": 2}, 1, "cpu", 1),
        ({"machine": 64}, 1, "cpu", 1),
        ({"machine": 16, "OMP_NUM_THREADS": 1}, 1, "cuda", 15),
        ({"affinity": 96, "cgroup": 32.5}, 8, "cuda", 3),
        ({"machine": 128}, 1, "cuda", 16),
        ({"machine": 2}, 2, "cuda", 1),
    ],
)
def test_workers_of_a_machine(limits, processes, place, workers, monkeypatch):
    monkeypatch.setattr(session, "core_limits", lambda: limits)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert session.data_workers(Config(dict(workers=None)), place) == workers
    assert session.data_workers(Config(dict(workers=0)), place) == 0


def test_advice_for_shards_is_more_workers_alone(tmp_path):
    (tmp_path / "it's").mkdir()
    write_photos(tmp_path / "it's", 1)
    config = Config(dict(workers=3, img_size=224))
    assert session.waiting_advice(config, "cpu", pack(tmp_path / "it's", tmp_path / "shards").out) == "--workers 6"
    assert """--pack '""" in session.waiting_advice(config, "cpu", tmp_path / "it's")
