"""Training order and samples: functions of (seed, position) alone; damaged photos; wrong labels."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image

from tinymim.errors import DataError
from tinymim.seg import ResumableSampler, TinyMIMSegDataset
from tinymim.seg.config import find_config


@pytest.fixture
def copy(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / "scenes")


def dataset(root, split="train"):
    init_default_scope("mmseg")  # as a runner of MMSegmentation does; not left to another test of this process
    cfg = find_config("upernet_tinymim_demo")
    part = cfg.train_dataloader if split == "train" else cfg.val_dataloader
    return TinyMIMSegDataset(str(root), split, part.dataset.pipeline, test_mode=split == "val")


def first(sampler, count):
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("size", [1, 5, 12])
def test_sampler_starts_anywhere_and_sees_every_photo_once_a_pass(size):
    whole = first(ResumableSampler(range(size), seed=7), 40)
    for start in (0, 1, size, 17):
        sampler = ResumableSampler(range(size), seed=7)
        sampler.skip(start)
        assert first(sampler, 20) == whole[start : start + 20]
    for turn in range(40 // size):
        assert sorted(i for i, _ in whole[turn * size : (turn + 1) * size]) == list(range(size))
    assert len({seed for _, seed in whole}) == 40
    assert first(ResumableSampler(range(size), seed=8), 40) != whole


def test_processes_share_the_positions(monkeypatch):
    whole = first(ResumableSampler(range(5), seed=7), 24)
    parts = []
    for rank in range(3):
        monkeypatch.setattr("tinymim.seg.dataset.get_dist_info", lambda rank=rank: (rank, 3))
        sampler = ResumableSampler(range(5), seed=7)
        sampler.skip(2)
        parts.append(first(sampler, 6))
    assert [x for group in zip(*parts, strict=True) for x in group] == whole[6:24]


def test_a_sample_depends_on_its_seed_alone(scenes):
    data = dataset(scenes)
    one, _, again, other = data[3, 11], data[5, 12], data[3, 11], data[3, 13]
    assert torch.equal(one["inputs"], again["inputs"])
    assert torch.equal(one["data_samples"].gt_sem_seg.data, again["data_samples"].gt_sem_seg.data)
    assert one["inputs"].shape != other["inputs"].shape or not torch.equal(one["inputs"], other["inputs"])


def test_validation_labels_keep_the_original_size(scenes):
    sample = dataset(scenes, "val")[0]
    assert sample["data_samples"].gt_sem_seg.shape == (80, 96)
    assert sample["inputs"].dtype == torch.uint8


def test_a_truncated_photo_is_stepped_over_and_named(copy):
    photo = sorted((copy / "images" / "training").iterdir())[3]
    photo.write_bytes(photo.read_bytes()[:-400])
    sample = dataset(copy)[3, 0]
    assert photo.name in sample["data_samples"].metainfo["skipped"][0]
    assert sample["data_samples"].metainfo["img_path"] == str(sorted((copy / "images" / "training").iterdir())[4])
    assert "skipped" not in dataset(copy)[5, 0]["data_samples"].metainfo


def test_only_damaged_photos_is_an_error(copy):
    for photo in (copy / "images" / "training").iterdir():
        photo.write_bytes(b"no photo")
    with pytest.raises(DataError, match="none of the 12 training photos"):
        dataset(copy)[0, 0]


def test_a_damaged_validation_photo_is_an_error_that_names_it(copy):
    photo = sorted((copy / "images" / "validation").iterdir())[0]
    photo.write_bytes(photo.read_bytes()[:-400])
    with pytest.raises(DataError, match=photo.name):
        dataset(copy, "val")[0]


def test_label_of_another_size(copy):
    label = sorted((copy / "annotations" / "training").iterdir())[0]
    data = dataset(copy)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(label)
    with pytest.raises(DataError, match="20 x 10 pixels, its photo 96 x 80"):
        data[0, 0]


def test_grey_and_rotated_photos(copy):
    photos = sorted((copy / "images" / "training").iterdir())
    Image.open(photos[0]).convert("L").save(photos[0])
    assert dataset(copy)[0, 0]["inputs"].shape[0] == 3
