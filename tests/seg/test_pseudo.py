"""Pseudo-labels of a segmentor and of its exported file; training on them beside labelled photos."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.seg.test_dataset import dataset as scenes_dataset
from tinymim.cli import main
from tinymim.data.folders import read_layout
from tinymim.errors import ConfigError, DataError
from tinymim.seg import ResumableSampler, TinyMIMSegDataset, estimate_segmentor, label_photos, train_segmentor

DEMO = "upernet_tinymim_demo"
STEPS = "train_cfg.max_iters"


class Photos:
    """What a sampler reads of a dataset."""

    def __init__(self, labelled, pseudo, weight):
        self.labelled, self.pseudo, self.weight = labelled, pseudo, weight

    def __len__(self):
        return self.labelled + self.pseudo


def first(sampler, count):
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize(("weight", "drawn"), [(1, 7), (0.5, 4), (2, 14), (0.01, 1), (2.7, 19)])
def test_passes_have_every_labelled_photo_and_shares_of_the_others(weight, drawn):
    data = Photos(5, 7, weight)
    sampler = ResumableSampler(data, seed=3)
    assert len(sampler) == 5 + drawn
    whole = first(sampler, 60 * len(sampler))
    indices = [index for index, _ in whole]
    for at in range(0, len(indices), len(sampler)):
        one = indices[at : at + len(sampler)]
        assert sorted(i for i in one if i < 5) == [0, 1, 2, 3, 4]
        others = [one.count(i) for i in range(5, 12)]
        assert sum(others) == drawn
        assert max(others) - min(others) <= 2  # a pass may take the end of one round and the start of the next
    counts = [indices.count(i) for i in range(5, 12)]
    assert max(counts) - min(counts) <= 1  # in the long run each as often as the others
    assert len({seed for _, seed in whole}) == len(whole)
    for start in (1, 17, len(sampler), 3 * len(sampler) + 2):
        again = ResumableSampler(data, seed=3)
        again.skip(start)
        assert first(again, 30) == whole[start : start + 30]


def test_processes_share_the_positions_of_both(monkeypatch):
    whole = first(ResumableSampler(Photos(5, 7, 0.5), seed=7), 36)
    parts = []
    for rank in range(3):
        monkeypatch.setattr("tinymim.seg.dataset.get_dist_info", lambda rank=rank: (rank, 3))
        sampler = ResumableSampler(Photos(5, 7, 0.5), seed=7)
        sampler.skip(2)
        parts.append(first(sampler, 10))
    assert [x for group in zip(*parts, strict=True) for x in group] == whole[6:36]


def test_in_the_order_of_the_folders():
    found = first(ResumableSampler(Photos(2, 3, 0.67), shuffle=False), 8)
    assert [index for index, _ in found] == [0, 1, 2, 3, 0, 1, 4, 2]


@pytest.fixture(scope="module")
def pseudo(scenes, tmp_path_factory):
    """The validation scenes, other names, as pseudo-labelled photos; their classes in another order; some unsure."""
    root = tmp_path_factory.mktemp("pseudo") / "labels"
    layout = read_layout(scenes)
    for i, (photo, label) in enumerate(layout.val):
        ids = layout.read_label(label)
        ids[:9, :9] = 255
        for kind in ("images", "annotations"):
            (root / kind / "training").mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, root / "images" / "training" / f"other{i}{photo.suffix}")
        Image.fromarray(np.where(ids == 255, ids, 11 - ids)).save(root / "annotations" / "training" / f"other{i}.png")
    about = {"classes": layout.classes[::-1], "palette": layout.palette[::-1]}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def test_their_labels_become_ids_of_the_labelled_folder(scenes, pseudo):
    plain = scenes_dataset(scenes)
    pipeline = [dict(type="LoadPhoto"), dict(type="LoadLabel"), dict(type="PackSegInputs")]
    data = TinyMIMSegDataset(str(scenes), "train", pipeline, pseudo=dict(data_root=str(pseudo), weight=0.5))
    assert (len(plain), len(data), data.labelled, data.pairs == plain.pairs) == (12, 17, 12, True)
    layout = read_layout(scenes)
    for i, (_, label) in enumerate(layout.val):
        found = data[12 + i, 0]["data_samples"].gt_sem_seg.data[0].numpy()
        wanted = layout.read_label(label)
        assert (found[:9, :9] == 255).all()
        assert np.array_equal(found[9:], wanted[9:])
    own = data[3, 0]["data_samples"].gt_sem_seg.data[0].numpy()
    assert np.array_equal(own, layout.read_label(layout.train[3][1]))


@pytest.mark.slow
def test_a_run_with_both_says_it_and_resumes_exactly(scenes, pseudo, small, tmp_path, capsys):
    def go(folder, **more):
        options = {STEPS: 4, "train_cfg.val_interval": 4}
        given = dict(data_root=scenes, pseudo=f"{pseudo}=0.5", cfg_options=small(**options)) | more
        return train_segmentor(DEMO, work_dir=folder, device="cpu", **given)

    whole = go(tmp_path / "whole")
    assert f"5 pseudo-labelled photos of {pseudo}, 2 of them in each pass" in capsys.readouterr().out
    noted = json.loads((tmp_path / "whole" / "env.json").read_text())["inputs"]
    assert (noted["pseudo"]["files"], noted["pseudo"]["weight"], noted["data"]["files"]) == (10, 0.5, 24)
    assert whole.images == 5
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (cut / "checkpoints" / "iter_4.pth").unlink()
    (cut / "segmentor.pth").unlink()
    moved = shutil.copytree(pseudo, tmp_path / "moved")
    go(cut, resume=True, pseudo=f"{moved}=0.5")  # the same files elsewhere
    one, other = (torch.load(run / "segmentor.pth", weights_only=True)["state_dict"] for run in (whole.work_dir, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)
    for wrong, words in (
        (f"{pseudo}=1", "pseudo.weight: 0.5 -> 1.0"),
        (None, "pseudo.weight: 0.5 -> None"),
    ):
        with pytest.raises(ConfigError, match=words):
            go(cut, resume=True, pseudo=wrong)
    next((moved / "annotations" / "training").iterdir()).unlink()
    next((moved / "images" / "training").iterdir()).unlink()
    shutil.copytree(pseudo, tmp_path / "more")
    shutil.copy(*[tmp_path / "more" / "images" / "training" / name for name in ("other0.jpg", "new.jpg")])
    shutil.copy(*[tmp_path / "more" / "annotations" / "training" / name for name in ("other0.png", "new.png")])
    with pytest.raises(ConfigError, match="started with other pseudo-labelled photos"):
        go(cut, resume=True, pseudo=f"{tmp_path / 'more'}=0.5")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("=0", "{}=0"),
        ("=-1", "{}=-1"),
        ("=nan", "{}=nan"),
        ("=much", "{}=much"),
        ("at most 100", "{}=1000"),
        ("there is no folder", "{}/none"),
        ("is not a labelled folder", "{}/images"),
    ],
)
def test_a_folder_or_weight_that_cannot_be(scenes, pseudo, small, tmp_path, words, value):
    with pytest.raises((ConfigError, DataError), match=words):
        train_segmentor(
            DEMO, work_dir=tmp_path / "run", data_root=scenes, pseudo=value.format(pseudo), cfg_options=small()
        )
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused_and_validation_photos_are_told(scenes, pseudo, small, tmp_path, capsys):
    other = shutil.copytree(pseudo, tmp_path / "other")
    about = json.loads((other / "dataset.json").read_text())
    about["classes"][0] = "unicorn"
    (other / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="other classes") as caught:
        estimate_segmentor(DEMO, data_root=scenes, pseudo=other, cfg_options=small())
    assert "tinymim label" in caught.value.fix
    shutil.rmtree(other)
    shutil.copytree(scenes / "images" / "validation", other / "images" / "training")
    shutil.copytree(scenes / "annotations" / "validation", other / "annotations" / "training")
    shutil.copy(scenes / "dataset.json", other)
    estimate_segmentor(DEMO, data_root=scenes, pseudo=other, cfg_options=small())
    assert "5 photos of" in (said := capsys.readouterr().out)
    assert "of validation photos" in said


@pytest.mark.slow
def test_a_segmentor_and_its_file_give_the_same_labels_and_a_student_learns(scenes, small, tmp_path, capsys):
    from tinymim_export import export

    run = train_segmentor(
        DEMO,
        work_dir=tmp_path / "run",
        data_root=scenes,
        device="cpu",
        cfg_options=small(**{STEPS: 60, "train_cfg.val_interval": 60, "optim_wrapper.optimizer.lr": 3e-3}),
    )
    photos = tmp_path / "photos"
    shutil.copytree(scenes / "images" / "training", photos / "a")
    shutil.copytree(scenes / "images" / "validation", photos / "b")
    Image.open(next((photos / "a").iterdir())).convert("L").resize((77, 131)).save(photos / "b" / "grey.png")
    by_pth = label_photos(photos, run.segmentor, tmp_path / "pth", min_confidence=0.1, device="cpu")
    export(checkpoint=run.segmentor, onnx=tmp_path / "seg.onnx", dynamic=True)
    line = ["label", str(photos), "--with", str(tmp_path / "seg.onnx"), "--out", str(tmp_path / "onnx")]
    assert main([*line, "--min-confidence", "0.1"]) == 0
    assert "next:    tinymim segment" in capsys.readouterr().out
    layouts = read_layout(tmp_path / "pth"), read_layout(tmp_path / "onnx")
    assert len(layouts[0].train) == by_pth.photos == 18
    same = pixels = 0
    for (_, one), (_, other) in zip(layouts[0].train, layouts[1].train, strict=True):
        found = layouts[0].read_label(one) == layouts[1].read_label(other)
        same, pixels = same + int(found.sum()), pixels + found.size
    assert same / pixels >= 0.999
    assert by_pth.kept < 1
    notes = [json.loads((tmp_path / name / "labels.json").read_text()) for name in ("pth", "onnx")]
    assert notes[0]["kept"] == pytest.approx(notes[1]["kept"], abs=0.002)
    for threshold, share in notes[0]["sure"].items():
        assert share == pytest.approx(notes[1]["sure"][threshold], abs=0.002)
    options = [f"{key}={str(value).replace(' ', '')}" for key, value in small(**{STEPS: 2}).items()]
    words = ["segment", DEMO, "--data-root", str(scenes), "--pseudo", f"{tmp_path / 'onnx'}=0.5"]
    assert main([*words, "--work-dir", str(tmp_path / "both"), "--device", "cpu", "--cfg-options", *options]) == 0
    assert "18 pseudo-labelled photos" in capsys.readouterr().out
    assert label_photos(photos, tmp_path / "both" / "segmentor.pth", tmp_path / "next", device="cpu").photos == 18
    assert main([*line[:-1], str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert main(["segment", "--test", str(run.segmentor), "--pseudo", str(tmp_path / "onnx")]) == 2
