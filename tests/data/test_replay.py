"""Replayed augmentation: golden views, the same in every process and on any number of workers, timm's operations."""

import hashlib
import random

import numpy as np
import pytest
import timm.data.auto_augment as theirs
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.export.photographs import photograph
from tinymim.data.pixels import UnreadablePhoto
from tinymim.data.replay import FILL, OPERATIONS, RandAugment, Replay, pairs, view_seed
from tinymim.errors import ConfigError

FULL = dict(img_size=32, rand_augment="m9-n2-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)


def pattern(height=50, width=70):
    """A picture of whole-number arithmetic alone, so that no library's draws are in the golden hashes."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([(x * 7 + y) % 256, (x * y) % 256, (x + y * 5) % 256], -1).astype(np.uint8))


def digest(*views):
    return hashlib.sha256(b"".join(view.numpy().tobytes() for view in views)).hexdigest()[:16]


def test_golden_views():
    """These never change: stores on disk hold targets of exactly these pixels. Pillow 13 made them."""
    plain, full = Replay(img_size=32), Replay(**FULL)
    views = [full.view(pattern(), seed) for seed in range(64)]
    said = {
        "crops": digest(*(plain.view(pattern(), seed) for seed in range(64))),
        "all": digest(*views),
        "mixed": digest(full.mix(torch.stack(views), range(64))),
        "mixup": digest(Replay(img_size=32, mixup=0.2).mix(torch.stack(views), range(64))),
        "seeds": [view_seed(seed, key, epoch) for seed, key, epoch in [(0, "a.jpg", 0), (1, "b/\udcff.png", 89)]],
        "pairs": pairs(9, 3, 1).tolist(),
    }
    assert said == {
        "crops": "d8140a7738e66ced",
        "all": "ab0a25e7dbd02d0d",
        "mixed": "0a27127381e91f22",
        "mixup": "583b6d5b9c277962",
        "seeds": [870271748, 556619358],
        "pairs": [6, 8, 3, 4, 1, 5, 0, 2, 7],
    }


@pytest.mark.parametrize("inc", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_timms(name, inc):
    """Of the same magnitude and sign they give the same pixels."""
    image = photograph(3, (41, 30)).point(lambda value: value // 2 + 30)
    kind = f"{name}Increasing" if inc and f"{name}Increasing" in theirs.NAME_TO_OP else name
    assert kind in (theirs._RAND_INCREASING_TRANSFORMS if inc else theirs._RAND_TRANSFORMS)
    seen = set()
    for magnitude in (0, 1.5, 4, 9, 10):
        for sign, number in ((1, 0.2), (-1, 0.9)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(random, "random", lambda number=number: number)
                level = theirs.LEVEL_TO_ARG[kind]
                arguments = () if level is None else level(magnitude, {})
                if name == "Posterize" and arguments == (0,):  # Pillow 13 refuses it
                    patch.setattr(theirs.ImageOps, "posterize", lambda image, bits: Image.new("RGB", image.size))
                wanted = theirs.NAME_TO_OP[kind](image, *arguments, resample=Image.Resampling.BICUBIC, fillcolor=FILL)
            ours = OPERATIONS[name](image, magnitude / 10, sign, inc)
            assert ours.mode == "RGB"
            assert np.array_equal(np.asarray(ours), np.asarray(wanted))
            seen.add(ours.tobytes())
    assert seen != {image.tobytes()}


def test_order_of_operations_is_timms():
    assert [*OPERATIONS] == theirs._RAND_TRANSFORMS


class Views(torch.utils.data.Dataset):
    """What a data worker makes of a photo."""

    def __init__(self, paths, replay):
        self.paths, self.replay = paths, replay

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        random.seed(i)  # draws of others in the same worker
        return self.replay.view(self.paths[i], view_seed(5, self.paths[i].name, 2))


def test_any_number_of_processes_makes_the_same_views(tmp_path):
    for i in range(5):
        photograph(i, (60 + i, 50)).save(tmp_path / f"{i}.jpg")
    paths, replay = sorted(tmp_path.iterdir()), Replay(**FULL)
    wanted = torch.stack([Views(paths, replay)[i] for i in range(5)])
    for workers in (1, 2):
        loader = DataLoader(Views(paths, replay), 2, num_workers=workers, multiprocessing_context="fork")
        assert torch.equal(torch.cat([*loader]), wanted)


def test_a_view_depends_on_nothing_but_photo_and_seed(tmp_path):
    photograph(0).save(tmp_path / "a.png")
    replay = Replay(**FULL)
    before = replay.view(tmp_path / "a.png", 7)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    assert torch.equal(replay.view(tmp_path / "a.png", 7), before)
    assert torch.equal(replay.view(Image.open(tmp_path / "a.png"), 7), before)
    assert not torch.equal(replay.view(tmp_path / "a.png", 8), before)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (before.dtype, before.shape) == (torch.uint8, (3, 32, 32))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_photos_of_every_kind(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey = Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30))
    (grey if mode == "I;16" else photograph(0, (20, 30)).convert(mode)).save(path)
    view = Replay(**FULL).view(path, 3)
    assert (view.dtype, view.shape) == (torch.uint8, (3, 32, 32))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_photos_of_odd_sizes(size):
    for seed in range(20):
        assert Replay(**FULL).view(Image.new("RGB", size, "red"), seed).shape == (3, 32, 32)
    assert Replay(img_size=1, erasing=1.0).view(Image.new("RGB", size), 0).shape == (3, 1, 1)


def test_a_turned_photo_is_seen_upright(tmp_path):
    image = photograph(2, (40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.png")
    replay = Replay(**FULL)
    assert torch.equal(replay.view(tmp_path / "a.png", 1), replay.view(tmp_path / "b.png", 1))


def test_a_damaged_photo(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    with pytest.raises(UnreadablePhoto, match="cannot read"):
        Replay().view(tmp_path / "a.jpg", 0)


def test_erasing_leaves_the_rest():
    with_, without = Replay(img_size=64, erasing=1.0), Replay(img_size=64)
    shares = []
    for seed in range(40):
        erased = (with_.view(pattern(), seed) != without.view(pattern(), seed)).any(0)
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        box = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.float().mean() > 0.95  # a rectangle, up to chance
        shares.append(box.numel() / 64**2)
    assert 0.01 < min(shares) < max(shares) < 0.36


def test_pairs_are_mixed_whatever_batch_they_are_in():
    replay, seeds = Replay(**FULL), [11, 4, 2, 9, 7]
    views = torch.stack([replay.view(pattern(), seed) for seed in seeds])
    kept = views.clone()
    mixed = replay.mix(views, seeds)
    assert torch.equal(views, kept)
    assert torch.equal(mixed[4], views[4])  # the odd tail
    assert not any(torch.equal(mixed[i], views[i]) for i in range(4))
    assert torch.equal(replay.mix(views[2:4], torch.tensor(seeds[2:4])), mixed[2:4])
    assert torch.equal(replay.mix(views[[1, 0]], [4, 11]), mixed[[1, 0]])  # in either order
    assert replay.mix(views[:0], []).shape == (0, 3, 32, 32)
    assert Replay(img_size=32).mix(views, seeds) is views


def test_mixup_and_cutmix_keep_the_shares():
    white, black = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    views, kinds = torch.cat([white, black]), {}
    for name in ("mixup", "cutmix"):
        for seed in range(30):
            one, two = Replay(img_size=64, **{name: 1.0}).mix(views, [seed, 1000])
            assert ((one.int() + two.int() - 255).abs() <= 1).all()  # what one loses, the other has
            kinds.setdefault(name, []).append(len(one.unique()))
    assert set(kinds["mixup"]) == {1}
    assert max(kinds["cutmix"]) == 2
    both = [len(Replay(img_size=64, mixup=1.0, cutmix=1.0).mix(views, [seed, 0])[0].unique()) for seed in range(60)]
    assert 12 < both.count(2) < 48


def test_pairs_of_an_epoch():
    for count in (0, 1, 2, 7, 100):
        assert sorted(pairs(count, 0, 3)) == [*range(count)]
    assert not np.array_equal(pairs(100, 0, 3), pairs(100, 0, 4))
    assert not np.array_equal(pairs(100, 1, 3), pairs(100, 0, 3))


def test_seeds_of_photos_are_spread():
    seeds = [view_seed(s, f"{i}.jpg", epoch) for s in range(2) for i in range(500) for epoch in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < 2**26
    assert 2**31 - 2**26 < max(seeds) < 2**31


def test_settings_name_the_augmentation():
    replay = Replay(**{**FULL, "rand_augment": "rand-inc1-mstd0.5-m9"})
    assert replay.settings == Replay(**FULL).settings == Replay(**replay.settings).settings
    assert replay.settings != Replay(**{**FULL, "rand_augment": "m9-inc1"}).settings
    assert Replay(scale=(1, 1)).settings == Replay(scale=[1.0, 1.0]).settings
    assert torch.equal(Replay(**replay.settings).view(pattern(), 5), Replay(**FULL).view(pattern(), 5))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(img_size=0),
        dict(img_size=32.0),
        dict(scale=(0.5, 0.1)),
        dict(scale=0.5),
        dict(flip=2),
        dict(erasing=float("nan")),
        dict(mixup=-1),
        dict(cutmix="1"),
        dict(rand_augment="m9-x1"),
        dict(rand_augment="augmix"),
        dict(rand_augment="m9-tweights"),
        dict(rand_augment="p3"),
        dict(rand_augment="n1.5"),
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        Replay(**wrong)


def test_rand_augment_follows_its_words():
    image = photograph(1, (20, 20))
    same = [RandAugment("m9-p0")(image, random.Random(seed)) is image for seed in range(20)]
    assert all(same)
    never = RandAugment("m9-n1-p1")
    changed = sum(never(image, random.Random(seed)).tobytes() != image.tobytes() for seed in range(60))
    assert changed > 45
    assert str(RandAugment("m9")) == "m9-n2-p0.5-mstd0-mmax10-inc0"
