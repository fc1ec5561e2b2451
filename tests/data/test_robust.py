"""Scores against hand-computed values, and whole evaluations of classifiers whose scores are known."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import tinymim
from tests.data.official import ALL, write_classes, write_corruptions
from tinymim.data.imagenet import CORRUPTIONS, wnids
from tinymim.data.robust import ALEXNET, corruption_errors, evaluate_folders, top1, top5
from tinymim.errors import CheckpointError, ConfigError, DataError

EXTRA = CORRUPTIONS["extra"]
TRANSFORM = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16), transforms.ToTensor()])


def read_colour(images: torch.Tensor) -> torch.Tensor:
    """A classifier for those photos: logits (B, 1000), 1 at the class whose colour it is."""
    rgb = (images.mean((2, 3)) * 255).round()
    classes = (rgb[:, 0] / 10).round() * 40 + (rgb[:, 1] / 6).round()
    return torch.nn.functional.one_hot(classes.long(), 1000).float()


def evaluate(predict, **more):
    return evaluate_folders(predict, **dict(transform=TRANSFORM, progress=False) | more)


# ---- scores


def test_top1_and_top5_by_hand():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 8], [0, 7, 1, 6, 5, 4, 3]])
    assert top1(logits, torch.tensor([0, 3])).tolist() == [True, False]
    assert top5(logits, torch.tensor([2, 6])).tolist() == [False, True]
    assert top5(logits, torch.tensor([3, 0])).tolist() == [True, False]
    some = torch.tensor([2, 3, 6])  # the largest logits of both photos do not count
    assert top1(logits, torch.tensor([6, 3]), some).tolist() == [True, True]
    assert top1(logits, torch.tensor([2, 6]), some).tolist() == [False, False]
    assert top5(logits, torch.tensor([2, 6]), some).tolist() == [True, True]


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
def test_columns_are_the_same_as_minus_infinity_elsewhere(seed, outputs, kept):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.permutation(4 * outputs).reshape(4, outputs)).float()
    columns = torch.from_numpy(rng.permutation(outputs)[: min(kept, outputs)])
    labels = columns[torch.from_numpy(rng.integers(len(columns), size=4))]
    masked = torch.full_like(logits, -torch.inf)
    masked[:, columns] = logits[:, columns]
    assert torch.equal(top1(logits, labels, columns), masked.argmax(1) == labels)
    rank = (masked > masked.gather(1, labels[:, None])).sum(1)
    assert torch.equal(top5(logits, labels, columns), rank < 5)


def test_mce_by_hand():
    """AlexNet's own mCE is 1; with other errors for one corruption only its CE changes."""
    assert (
        hashlib.sha256(str(sorted(ALEXNET.items())).encode()).hexdigest()[:16] == "a4980b71d6c714e3"
    )  # all 15, as published
    errors = {name: [value] * 5 for name, value in ALEXNET.items()}
    score = corruption_errors(errors)
    assert score.mce == pytest.approx(1)
    assert score.error == pytest.approx(0.788993, abs=1e-6)  # 11.834896 / 15
    errors["jpeg_compression"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    score = corruption_errors(errors)
    jpeg = score.corruptions["jpeg_compression"]
    assert (jpeg["severity"], jpeg["error"]) == ([0.1, 0.2, 0.3, 0.4, 0.5], pytest.approx(0.3))
    assert jpeg["ce"] == pytest.approx(0.494641, abs=1e-6)  # .3 / .6065
    assert score.mce == pytest.approx(0.966309, abs=1e-6)  # (14 + .494641) / 15


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=15, max_size=15), st.randoms())
def test_mce_is_linear_and_blind_to_order(values, random):
    errors = dict(zip(ALEXNET, values, strict=True))
    whole = corruption_errors(errors)
    assert whole.mce == pytest.approx(sum(sum(v) / 5 / ALEXNET[k] for k, v in errors.items()) / 15)
    names = random.sample(list(errors), 15)
    half = corruption_errors({k: [e / 2 for e in random.sample(errors[k], 5)] for k in names})
    assert (2 * half.mce, 2 * half.error) == (pytest.approx(whole.mce), pytest.approx(whole.error))


def test_extra_corruptions_are_no_part_of_mce():
    errors = {name: [value] * 5 for name, value in ALEXNET.items()}
    score = corruption_errors(errors | {name: [0.0] * 5 for name in EXTRA})
    assert (score.mce, score.error) == (corruption_errors(errors).mce, corruption_errors(errors).error)
    assert [score.corruptions[name]["ce"] for name in EXTRA] == [None] * 4


def test_partial_and_wrong_errors():
    few = {"fog": [0.5] * 5}
    with pytest.raises(DataError, match="no mCE without gaussian_noise, shot_noise"):
        corruption_errors(few)
    score = corruption_errors(few, allow_partial=True)
    assert (score.mce, score.error) == (None, None)
    assert score.corruptions["fog"]["ce"] == pytest.approx(0.610259, abs=1e-6)  # .5 / .819324
    for wrong in ({"fogg": [0.5] * 5}, {"fog": [0.5] * 4}, {"fog": [50.0] * 5}, {"fog": [float("nan")] * 5}):
        with pytest.raises(DataError, match="fog"):
            corruption_errors(wrong, allow_partial=True)


# ---- evaluation


def test_every_set_with_known_scores(tmp_path, capsys):
    """A classifier that reads the colour, wrong on purpose: it takes goldfish (1) for tench (0)."""
    a, r = wnids("imagenet-a"), wnids("imagenet-r")
    assert "n01443537" in r
    assert "n01443537" not in a

    def predict(images):
        logits = read_colour(images)
        logits[:, 0] += 2 * logits[:, 1]
        return logits

    folders = dict(
        imagenet=write_classes(tmp_path / "val", ALL[:4]),
        a=write_classes(tmp_path / "a", a[:3]),
        r=write_classes(tmp_path / "r", r[:3]),
        c=write_corruptions(tmp_path / "c", [*ALEXNET, "saturate"], ALL[1:3]),
    )
    result = evaluate(predict, batch_size=3, progress=True, **folders)
    assert json.loads(json.dumps(result)) == result
    assert result["imagenet"]["top1"] == 3 / 4
    assert result["imagenet"]["top5"] == 1
    assert result["imagenet"]["photos"] == 4
    assert (result["imagenet-a"]["top1"], result["imagenet-r"]["top1"]) == (1, 1)  # tench is in neither
    c = result["imagenet-c"]
    assert c["error"] == pytest.approx(0.5)
    assert c["mce"] == pytest.approx(np.mean([0.5 / value for value in ALEXNET.values()]))
    assert c["corruptions"]["saturate"] == {"error": 0.5, "severity": [0.5] * 5, "ce": None}
    assert (c["photos"], c["skipped"]) == (16 * 5 * 2, [])
    printed = capsys.readouterr().out
    assert "imagenet-c jpeg_compression/5: 2 photos, top-1 50.00%" in printed
    assert "warning: imagenet-a: no photos of 197 of 200 classes" in printed


def test_partial_imagenet_c_gives_no_mce(tmp_path):
    result = evaluate(read_colour, c=write_corruptions(tmp_path, ["snow"], ALL[:2], grouped=True))["imagenet-c"]
    assert (result["mce"], result["error"]) == (None, None)
    assert result["corruptions"] == {"snow": {"error": 0, "severity": [0] * 5, "ce": 0}}
    assert any(w.startswith("no mCE without gaussian_noise") for w in result["warnings"])


@pytest.mark.parametrize("workers", [0, 2])
def test_own_classes_agree_with_torchvision(tmp_path, workers):
    """A real small model with five outputs, photos of noise; torchvision's reader and a plain loop as the reference."""
    rng = np.random.default_rng(0)
    for i in range(25):
        path = tmp_path / f"class{i % 5}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 17, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    vit = tinymim.models.ViT(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2).eval()
    head = torch.nn.Linear(12, 5)

    def predict(images):
        return head(3 * vit(images).mean(1))

    data = ImageFolder(str(tmp_path), TRANSFORM)
    with torch.inference_mode():
        right = sum(int((predict(x).argmax(1) == y).sum()) for x, y in DataLoader(data, 7))
    assert 0 < right < 25
    result = evaluate(predict, imagenet=tmp_path, classes=data.classes, batch_size=4, workers=workers)["imagenet"]
    assert result == {"top1": right / 25, "top5": 1.0, "photos": 25, "skipped": [], "warnings": []}


def test_limit_is_spread_over_the_classes(tmp_path):
    write_classes(tmp_path, ALL[:4], photos=3)
    seen = []

    def predict(images):
        seen.extend(read_colour(images).argmax(1).tolist())
        return read_colour(images)

    assert evaluate(predict, imagenet=tmp_path, limit=4)["imagenet"]["photos"] == 4
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_damaged_photos_are_skipped_and_named(tmp_path, capsys, batch_size):
    write_classes(tmp_path, ALL[:2], photos=2)
    broken = tmp_path / ALL[0] / "1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    result = evaluate(read_colour, imagenet=tmp_path, batch_size=batch_size, progress=True)["imagenet"]
    assert (result["top1"], result["photos"], result["skipped"]) == (1, 3, [str(broken)])
    assert f"skipped damaged photo {broken}" in capsys.readouterr().out
    for path in tmp_path.rglob("*.JPEG"):
        path.write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"no photo of .* can be read\n.*all 4"):
        evaluate(read_colour, imagenet=tmp_path)


def test_grey_and_transparent_photos_are_read(tmp_path):
    (tmp_path / ALL[0]).mkdir()
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (20, 20)).save(tmp_path / ALL[0] / f"{mode.replace(';', '')}.{suffix}")
    assert evaluate(lambda x: torch.zeros(len(x), 1000), imagenet=tmp_path)["imagenet"]["photos"] == 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(imagenet=None), ConfigError, "nothing to evaluate"),
        (dict(limit=0), ConfigError, "no photos to score"),
        (dict(batch_size=0), ConfigError, "no photos to score"),
        (
            dict(a="x", c="x", classes=ALL[:2]),
            ConfigError,
            "scored on imagenet-a, imagenet-c\n.*it has 2 other classes",
        ),
        (dict(a="/nowhere"), DataError, "no folder at /nowhere"),
        (dict(classes=ALL[:2]), ConfigError, "returns .2, 1000. for 2 photos"),
        (dict(classes=["a", "b"]), DataError, "2 unknown classes"),
        (dict(predict=lambda x: torch.zeros(len(x), 10)), ConfigError, "needed: 1000 classes"),
        (dict(predict=lambda x: torch.full((len(x), 1000), torch.nan)), CheckpointError, "returns NaN"),
    ],
)
def test_bad_input(tmp_path, change, error, words):
    arguments = dict(predict=read_colour, imagenet=write_classes(tmp_path, ALL[:2])) | change
    with pytest.raises(error, match=words):
        evaluate(**arguments)
