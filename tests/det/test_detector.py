"""The detector: shapes, what is trained, files, scores, a run that resumes exactly, the command."""

import json
import shutil

import pytest
import torch

from tests.det.scenes import write_coco
from tinymim.cli import main
from tinymim.det import Detector, detect, evaluate_detector, load_detector, read_coco, save_detector
from tinymim.det.coco import run_lengths, tools
from tinymim.det.job import score_detector
from tinymim.det.pyramid import DetectorBackbone
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import ViT, create_model, save_student

SMALL = dict(channels=8, anchor_sizes=[16, 32, 48, 64, 96], scale_jitter=[0.8, 1.25], warmup_steps=2)
STUDENT = dict(embed_dim=24, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return write_coco(folder / "train", 6, seed=1).parent, write_coco(folder / "val", 4, seed=2).parent


def options(sets, out, **more):
    train, val = sets
    return (
        dict(
            data=train / "photos",
            annotations=train / "objects.json",
            val_data=val / "photos",
            val_annotations=val / "objects.json",
            img_size=64,
            batch_size=2,
            max_steps=4,
            save_every=2,
            workers=0,
            device="cpu",
            out=out,
            cfg_options={**SMALL, "student_args": STUDENT, "precision": "fp32"},
        )
        | more
    )


@pytest.mark.parametrize("name", ["plain", "hiera_tiny_224"])
def test_levels(name):
    """Five levels at strides 4 to 64, of one width; every part that is trained has a gradient."""
    backbone = ViT(img_size=64, **STUDENT) if name == "plain" else create_model(name, img_size=64)
    body = DetectorBackbone(backbone, 16)
    levels = body(torch.randn(2, 3, 96, 64))
    shapes = [tuple(level.shape) for level in levels.values()]
    assert shapes == [(2, 16, 24, 16), (2, 16, 12, 8), (2, 16, 6, 4), (2, 16, 3, 2), (2, 16, 2, 1)]
    sum(level.sum() for level in levels.values()).backward()
    assert [n for n, p in body.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_perfect_detector_has_100_percent(sets):
    """Scores are those of pycocotools on the boxes and masks as they are in the file."""
    data = read_coco(sets[1] / "objects.json", sets[1] / "photos")

    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"masks": True}
            self.weight, self.at = torch.nn.Parameter(torch.zeros(1)), -1

        def forward(self, images):
            self.at += 1
            item = data.items[self.at]
            masks = [tools().decode(run_lengths(shape, item.size)) for shape in item.shapes]
            return [
                {
                    "boxes": torch.tensor(item.boxes),
                    "labels": torch.tensor(item.labels),
                    "scores": torch.ones(len(item.labels)),
                    "masks": torch.stack([torch.from_numpy(mask).float()[None] for mask in masks]),
                }
            ]

    scores = evaluate_detector(Perfect(), data)
    assert (scores.box_ap, scores.mask_ap) == (100.0, 100.0)
    assert scores.class_ap == {"circle": 100.0, "square": 100.0}


def test_training_resumes_exactly(sets, tmp_path):
    """Stopped after two of four steps and resumed: the same weights as in one go."""
    whole = detect(**options(sets, tmp_path / "whole"))
    stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for newer in (stopped / "checkpoints").glob("*4*.pth"):
        newer.unlink()
    resumed = detect(**options(sets, stopped, resume=True))
    a, b = (torch.load(r.detector, weights_only=True)["model"] for r in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole.scores is not None
    assert json.loads((tmp_path / "whole" / "result.json").read_text(encoding="utf-8"))["scores"]["photos"] == 4


def test_a_file_is_the_detector(sets, tmp_path):
    """Scores of the file are those of the model; a damaged description is refused."""
    torch.manual_seed(0)
    model = Detector(ViT(img_size=64, **STUDENT), ["circle", "square"], img_size=64, channels=8).eval()
    save_detector(model, tmp_path / "d.pth")
    again, meta = load_detector(tmp_path / "d.pth")
    assert meta["classes"] == ["circle", "square"]
    photo = [torch.rand(3, 64, 80)]
    for key, value in model(photo)[0].items():
        assert torch.equal(again(photo)[0][key], value)
    content = torch.load(tmp_path / "d.pth", weights_only=True)
    for change in (dict(detector={"img_size": 1e9}), dict(classes=None), dict(name="x"), dict(classes=["one"])):
        torch.save({**content, "meta": {**content["meta"], **change}}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError):
            load_detector(tmp_path / "bad.pth")
    scores = score_detector(tmp_path / "d.pth", sets[1] / "photos", sets[1] / "objects.json", "cpu")
    assert scores.photos == 4


def test_boxes_only_and_a_student(sets, tmp_path):
    """Without masks, on a student's file of another shape than the recipe's."""
    save_student(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), tmp_path / "s.pth")
    options_ = options(sets, tmp_path / "run", student=tmp_path / "s.pth", max_steps=2)
    options_["cfg_options"] = {**SMALL, "masks": False}
    result = detect(**options_)
    model, _ = load_detector(result.detector)
    assert model.backbone.depth == 1
    assert result.scores.mask_ap is None


def test_command(sets, tmp_path, capsys):
    """A dry run, then scoring a file with its next line."""
    train, _ = sets
    words = [
        "detect",
        "--data",
        str(train / "photos"),
        "--annotations",
        str(train / "objects.json"),
        "--img-size",
        "64",
    ]
    small = [f"{key}={value}".replace(" ", "") for key, value in SMALL.items()]
    shape = [f"student_args.{key}={value}" for key, value in STUDENT.items()]
    run = [*words, "--img-size", "64", "--batch-size", "2", "--max-steps", "1", "--workers", "0", "--device", "cpu"]
    out = ["--out", str(tmp_path / "run")]
    assert main([*run, *out, "--dry-run", "--cfg-options", *small, *shape]) == 0
    assert not (tmp_path / "run").exists()
    assert main([*run, *out, "--cfg-options", *small, *shape]) == 0
    said = capsys.readouterr().out
    assert "next: tinymim detect --test" in said
    score = ["--data", str(train / "photos"), "--annotations", str(train / "objects.json"), "--device", "cpu"]
    file = str(tmp_path / "run" / "detector.pth")
    assert main(["detect", "--test", file, *score, "--json", str(tmp_path / "ap.json")]) == 0
    assert json.loads((tmp_path / "ap.json").read_text(encoding="utf-8"))["kind"] == "tinymim.detection"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(annotations=None), "no annotations"),
        (dict(val_annotations=None), "belong together"),
        (dict(img_size=72), "a multiple of 32"),
        (dict(strategy="fsdp"), "strategy=fsdp"),
    ],
)
def test_bad_input(sets, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        detect(**options(sets, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_objects_without_masks(sets, tmp_path):
    content = json.loads((sets[0] / "objects.json").read_text(encoding="utf-8"))
    content["annotations"][0].pop("segmentation")
    (tmp_path / "o.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="have no mask"):
        detect(**options(sets, tmp_path / "run", annotations=tmp_path / "o.json"))
