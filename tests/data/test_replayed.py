"""Photos whose views follow from seeds: pairs, their order on any number of processes, damaged photos."""

import numpy as np
import pytest
import torch

from tests.export.photographs import photograph
from tinymim.data.photos import StepSampler
from tinymim.data.replay import Replay, pairs, view_seed
from tinymim.data.replayed import ReplayedPhotos
from tinymim.errors import DataError

MIXED = dict(img_size=32, mixup=0.8, cutmix=1.0)


class Stored:
    """Seeds and a target for every photo but one."""

    seed = 3

    def __init__(self, without=""):
        self.without = without

    def __call__(self, key, epoch):
        return None if key == self.without else (view_seed(self.seed, key, epoch), {"values": torch.tensor([1.0])})


@pytest.fixture
def photos(tmp_path):
    """Seven photos; their keys sort in another order than their list."""
    for i in range(7):
        photograph(i).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(7)]
    return files, {file: f"{'ab'[i % 2]}/{6 - i}.png" for i, file in enumerate(files)}


def partners(photos, keys, replay, stored=None, *, seed, epoch):
    """Sets of keys that are neighbours in the order of an epoch."""
    order = ReplayedPhotos(photos, keys, replay, stored, seed=seed).order(epoch)
    assert sorted(order) == [*range(len(photos))]
    return {frozenset(keys[photos[i]] for i in order[at : at + 2]) for at in range(0, len(order), 2)}


def test_who_is_mixed_with_whom_is_the_stores(photos):
    files, keys = photos
    replay, stored = Replay(**MIXED), Stored()
    names = sorted(keys.values())
    wanted = [names[i] for i in pairs(7, stored.seed, 1)]
    wanted = {frozenset(wanted[at : at + 2]) for at in range(0, 7, 2)}
    for seed in range(3):  # of the run: it shuffles pairs
        assert partners(files, keys, replay, stored, seed=seed, epoch=1) == wanted
    assert partners(files[::-1], keys, replay, stored, seed=0, epoch=1) == wanted
    assert partners(files, keys, replay, seed=3, epoch=1) == wanted  # a live teacher's run of this seed
    assert partners(files, keys, replay, seed=4, epoch=1) != wanted
    orders = [ReplayedPhotos(files, keys, replay, stored, seed=seed).order(1).tolist() for seed in range(5)]
    assert len({*map(tuple, orders)}) > 2
    assert len({order[-1] for order in orders}) == 1  # the odd tail


def test_without_mixing_the_order_is_that_of_other_runs(photos):
    files, keys = photos
    own = ReplayedPhotos(files, keys, Replay(img_size=32), Stored(), seed=2)
    with_, without = (StepSampler(7, 2, 6, seed=2, order=order) for order in (own.order, None))
    assert [*with_] == [*without]


@pytest.mark.parametrize("world", [1, 2])
def test_views_do_not_depend_on_processes_or_on_a_restart(photos, world):
    files, keys = photos
    own = ReplayedPhotos(files, keys, Replay(**MIXED), Stored(), seed=0)
    alone = torch.cat(
        [own.collate([own[key] for key in step])["image"] for step in StepSampler(7, 4, 3, order=own.order)]
    )
    found = []
    for step in range(3):
        for rank in range(world):
            sampler = StepSampler(7, 4, step + 1, order=own.order, start=step, rank=rank, world=world)
            found += [own.collate([own[key] for key in batch])["image"] for batch in sampler]
    assert torch.equal(torch.cat(found), alone)


def test_an_item_is_the_view_and_the_targets(photos):
    files, keys = photos
    item = ReplayedPhotos(files, keys, Replay(img_size=32), Stored())[(4, 2)]
    assert torch.equal(item["image"], Replay(img_size=32).view(files[2], view_seed(3, keys[files[2]], 4)))
    assert (float(item["values"]), item["skipped"]) == (1.0, [])
    live = ReplayedPhotos(files, keys, Replay(img_size=32), seed=3)
    assert torch.equal(live[(4, 2)]["image"], item["image"])
    assert {*live.collate([live[(4, 2)]])} == {"image", "skipped"}


def test_damaged_photos_and_photos_that_were(photos):
    files, keys = photos
    files[1].write_bytes(b"no photo")
    own = ReplayedPhotos(files, keys, Replay(img_size=32), Stored(without=keys[files[2]]))
    item = own[(0, 1)]
    assert item["skipped"] == [str(files[1]), str(files[2])]
    assert torch.equal(item["image"], own[(0, 3)]["image"])
    mixing = ReplayedPhotos(files, keys, Replay(**MIXED), Stored())
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        mixing[(0, 1)]
    assert np.array_equal(mixing[(0, 0)]["image"].shape, (3, 32, 32))
