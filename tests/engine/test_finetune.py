"""Fine-tuning on real small models: recipes, exact resume, mixing, averages, DeiT's distillation, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from PIL.JpegImagePlugin import JpegImageFile

from tests.attack.forked import TRACEBACK, fork, run
from tests.attack.kills import logged
from tinymim.cli import main
from tinymim.data.imagenet import read_class_folder
from tinymim.data.labelled import LabelledPhotos
from tinymim.data.photos import crop_box, to_tensor
from tinymim.data.pixels import open_photo
from tinymim.engine import finetune, finetuning, load_recipe
from tinymim.engine.classify import ClassifyModel, CosineHook
from tinymim.engine.finetuning import build_classifier, eval_transform, train_transform
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.models import ViT, create_model, logit_teacher, model_from_checkpoint, save_student, teachers
from tinymim.models.classifier import Classifier, load_classifier, save_classifier
from tinymim.models.logit_teacher import load_label_teacher, load_logit_teacher
from tinymim.records import read_env

SMALL = {"student_args": dict(depth=2, embed_dim=24, num_heads=2), "crop_scale": (0.5, 1.0)}
CLASSES = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three classes that colour tells apart: 12 photos each to train on, 4 each to score."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 40, (44, 52, 3)) + np.array(colour)
                photo = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
                photo.save(root / split / name / f"{i}.png")
    return root


def options(folders, **more):
    cfg = SMALL | more.pop("cfg_options", {})
    return (
        dict(
            data=folders / "train",
            val_data=folders / "val",
            img_size=32,
            batch_size=12,
            epochs=4,
            workers=0,
            device="cpu",
            cfg_options=cfg,
        )
        | more
    )


def records(out):
    return logged(out / "metrics.jsonl")


def test_published_recipe_of_the_base_model():
    """README and code of the paper; S and T say that they are ours."""
    base = load_recipe("finetune_base")
    assert (base.student, base.batch_size, base.epochs, base.warmup_epochs) == ("tinymim_vit_base", 1024, 100, 5)
    assert (base.base_lr, base.min_lr, base.layer_decay, base.weight_decay) == (5e-4, 1e-6, 0.65, 0.05)
    assert (base.drop_path, base.mixup, base.cutmix, base.reprob, base.smoothing) == (0.2, 0.8, 1.0, 0.25, 0.1)
    assert (base.aa, tuple(base.betas), base.ema) == ("rand-m9-mstd0.5-inc1", (0.9, 0.999), None)
    star = load_recipe("finetune_star_tiny")
    assert (star.num_heads, star.epochs, star.distillation) == (12, 1000, "hard")
    for name in ("finetune_small", "finetune_tiny"):
        assert "Our numbers" in (load_recipe(name).text)


def test_layer_decay_and_schedule():
    """0.65^13 for the embeddings of ViT-B, 1 for the head; warm-up from 0, then a cosine down to min_lr, all scaled."""
    network = Classifier(create_model("tinymim_vit_base", img_size=32), 5)
    groups = network.layer_groups(0.65, 0.05)
    scales = {round(g["lr_scale"], 6) for g in groups}
    assert scales == {round(0.65**k, 6) for k in range(14)}
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in network.parameters())
    plain = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert id(network.backbone.pos_embed) in plain
    assert id(network.backbone.cls_token) in plain
    assert id(network.head.weight) not in plain
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    hook = CosineHook(optimizer, steps=100, warmup=10, final=1e-6)
    for step, expected in ((0, 0.0), (5, 1e-3), (10, 2e-3), (55, (2e-3 + 1e-6) / 2), (99, 1e-6 + 2e-3 * 0.000305)):
        hook.before_train_iter(None, step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=2e-3, abs=1e-12)


def test_it_learns_and_the_file_says_the_same(folders, tmp_path):
    """Colours are learned; the written file gives the written scores, and is a student for every other reader."""
    result = finetune(**options(folders, out=tmp_path / "run", epochs=30, lr=5e-3, cfg_options={"ema": 0.9}))
    assert result.top1 > 0.6
    assert json.loads((tmp_path / "run/result.json").read_text())["top1"] == result.top1
    model, checkpoint = load_classifier(result.classifier)
    assert checkpoint.meta["classes"] == [*CLASSES]
    view, right = eval_transform(32), 0
    for label, name in enumerate(CLASSES):
        for path in sorted((folders / "val" / name).iterdir()):
            with torch.no_grad():
                right += int(model(view(Image.open(path).convert("RGB"))[None]).argmax()) == label
    assert right == round(result.top1 * 12)
    backbone, _ = model_from_checkpoint(result.classifier)
    assert all(
        torch.equal(v, model.backbone.state_dict()[k])
        for k, v in backbone.state_dict().items()
        if not k.startswith("norm.")
    )
    rates = [r["lr"] for r in records(result.out) if "lr" in r]
    assert max(rates) == pytest.approx(5e-3)
    assert rates[-1] < 2e-5


@pytest.mark.parametrize("extra", [{}, {"ema": 0.99, "mixup": 0.0, "reprob": 0.5}], ids=["mixed", "averaged"])
def test_interrupt_and_resume_are_exact(folders, tmp_path, monkeypatch, extra, capsys):
    """Order, RandAugment, mixing, drop path and the average continue as if nothing had happened."""
    from tinymim.engine.loop import StepLoop

    chosen = {"drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0} | extra | ({"cutmix": 0.0} if "ema" in extra else {})
    whole = finetune(**options(folders, out=tmp_path / "whole", cfg_options=chosen))
    original = StepLoop.run_iter

    def interrupt(self, batch):
        original(self, batch)
        if self.iter == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepLoop, "run_iter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(**options(folders, out=tmp_path / "cut", cfg_options=chosen))
    monkeypatch.setattr(StepLoop, "run_iter", original)
    load_classifier(tmp_path / "cut/classifier.pth")
    assert "written after 5 of" in capsys.readouterr().out
    result = finetune(**options(folders, out=tmp_path / "cut", cfg_options=chosen, resume=True))
    assert records(result.out) == records(whole.out)
    assert finetune(**options(folders, out=tmp_path / "cut", cfg_options=chosen, resume=True)).top1 == whole.top1
    capsys.readouterr()
    load_classifier(result.classifier)
    assert "written after" not in capsys.readouterr().out
    a, b = (torch.load(r.classifier, weights_only=True)["model"] for r in (whole, result))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_star_distils_from_a_timm_teacher(folders, tmp_path):
    """12 heads, token, wide layer; a 6-head student is regrouped, its token copied; hard and soft losses are DeiT's."""
    torch.manual_seed(0)
    source = ViT(img_size=32, embed_dim=48, depth=2, num_heads=6)
    save_student(source, tmp_path / "student.pth")
    teacher = timm.create_model("resnet10t", num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "resnet.pth")
    result = finetune(
        "finetune_star_tiny",
        **options(
            folders,
            out=tmp_path / "run",
            student=str(tmp_path / "student.pth"),
            teacher="timm/resnet10t",
            teacher_weights=str(tmp_path / "resnet.pth"),
            epochs=1,
            cfg_options={"student_args": dict(last_dim=64)},
        ),
    )
    model, _ = load_classifier(result.classifier)
    assert (model.backbone.num_heads, model.head.in_features, model.head_dist.out_features) == (12, 64, 3)
    assert {"labels", "teacher", "loss"} <= set(records(result.out)[1])

    images = torch.randn(4, 3, 32, 32)
    own, taught = model.answers(images)
    assert torch.allclose(model(images), (own + taught) / 2)
    taught_by = load_label_teacher("timm/resnet10t", [*CLASSES], weights=tmp_path / "resnet.pth")
    told = taught_by.model(taught_by.view(images))
    for kind, expected in (
        ("hard", -taught.log_softmax(1)[range(4), told.argmax(1)].mean()),
        ("soft", 9 * ((told / 3).softmax(1) * ((told / 3).log_softmax(1) - (taught / 3).log_softmax(1))).sum(1).mean()),
    ):
        wrapped = ClassifyModel(model, teacher=taught_by, distillation=kind, alpha=0.3, tau=3.0, smoothing=0.0).train()
        model.eval()
        losses = wrapped(images, torch.tensor([0, 1, 2, 0]))
        assert losses["teacher"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert losses["loss"].item() == pytest.approx(0.7 * losses["labels"].item() + 0.3 * expected.item(), rel=1e-4)


def test_a_classifier_of_ours_teaches_in_its_own_normalisation(folders, tmp_path):
    network = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 3)
    save_classifier(network, tmp_path / "c.pth", [*CLASSES])
    taught = load_label_teacher(str(tmp_path / "c.pth"), [*CLASSES])
    images = torch.randn(2, 3, 48, 48)
    assert taught.view(images).shape == (2, 3, 32, 32)
    result = finetune(**options(folders, out=tmp_path / "run", teacher=str(tmp_path / "c.pth"), epochs=1))
    assert "teacher" in records(result.out)[1]


def test_one_loader_serves_labels_and_stores(tmp_path):
    """Its values are checked; its sha256 are those that records of earlier runs hold: of the file, of the tensors."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    labels = load_label_teacher("timm/resnet10t", [*CLASSES], weights=tmp_path / "resnet.pth")
    logits = load_logit_teacher("timm/resnet10t", weights=tmp_path / "resnet.pth")
    assert (labels.sha256, logits.sha256) == (sha256_file(tmp_path / "resnet.pth"), teachers.state_sha256(network))
    assert all(torch.equal(a, b) for a, b in zip(labels.model.parameters(), logits.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="has 3 classes, the photos have 2"):
        load_label_teacher("timm/resnet10t", ["a", "b"], weights=tmp_path / "resnet.pth")
    network.fc.weight.data[0, 0] = float("nan")
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        load_label_teacher("timm/resnet10t", [*CLASSES], weights=tmp_path / "resnet.pth")


def published(layout, tmp_path):
    """The authors' layouts (facts, section 10), small: pre-trained, fine-tuned, starred and fine-tuned."""
    torch.manual_seed(3)
    shape = dict(img_size=32, embed_dim=24, depth=2, num_heads=2)
    if layout == "PT":
        state = ViT(**shape).state_dict()
    elif layout == "FT":
        full = Classifier(ViT(**shape), 3).state_dict()
        state = {k.removeprefix("backbone."): v for k, v in full.items()}
        assert not any(k.startswith("norm.") for k in state)
    else:
        full = Classifier(ViT(**shape, dist_token=True, last_dim=40), 3).state_dict()
        state = {k.removeprefix("backbone."): v for k, v in full.items()}
        assert {
            "dist_token",
            "conv1x1.0.weight",
            "conv1x1.1.weight",
            "head.weight",
            "head_dist.weight",
            "fc_norm.weight",
        } <= set(state)
    torch.save({"model": state}, tmp_path / f"{layout}.pth")
    return tmp_path / f"{layout}.pth", state


@pytest.mark.parametrize("layout", ["PT", "FT", "Tstar"])
def test_published_layouts_become_classifiers_and_teachers(layout, tmp_path, folders):
    """Into fine-tuning (the named model gives the heads), as a classifier as they are, and as a teacher."""
    from tinymim.models.teachers import load_teacher

    path, state = published(layout, tmp_path)
    config = load_recipe(
        "finetune_tiny",
        {"img_size": 32, "num_heads": 2}
        | SMALL
        | ({"student_args.dist_token": True, "student_args.last_dim": 40} if layout == "Tstar" else {}),
    )
    network = build_classifier(config, 5, str(path))
    assert torch.equal(network.backbone.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert network.backbone.num_heads == 2
    teacher = load_teacher(str(path), num_heads=2)
    assert len(teacher.model.blocks) == 2
    if layout == "PT":
        with pytest.raises(CheckpointError, match="holds no classifier"):
            load_classifier(path, num_heads=2)
    else:
        model, _ = load_classifier(path, num_heads=2)
        assert torch.equal(model.head.weight, state["head.weight"])
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_other_widths_take_the_files_shape_and_ask_for_heads(tmp_path):
    torch.save({"model": ViT(img_size=32, embed_dim=48, depth=2, num_heads=4).state_dict()}, tmp_path / "f.pth")
    with pytest.raises(ConfigError, match="head count of"):
        build_classifier(load_recipe("finetune_tiny", {"img_size": 32}), 5, str(tmp_path / "f.pth"))
    network = build_classifier(
        load_recipe("finetune_tiny", {"img_size": 64, "num_heads": 4}), 5, str(tmp_path / "f.pth")
    )
    assert (network.backbone.embed_dim, network.backbone.depth, network.backbone.num_heads) == (48, 2, 4)
    assert network.backbone.pos_embed.shape == (1, 17, 48)


def test_what_is_said_of_a_file_and_a_folder(folders, tmp_path, capsys):
    """Another shape than the named model's, arguments against the file, a class without held-out photos, an .onnx."""
    save_student(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), tmp_path / "s.pth")
    few = tmp_path / "few"
    for name in ("blue", "red"):
        (few / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(few / name / "0.png")
    finetune(
        **options(
            folders,
            out=tmp_path / "run",
            student=str(tmp_path / "s.pth"),
            val_data=few,
            max_steps=1,
            cfg_options={"student_args": {}},
        )
    )
    said = capsys.readouterr().out
    assert "its shape is used, not tinymim_vit_tiny's" in said
    assert "has no photos of green: the score covers 2 classes" in said
    load_classifier(tmp_path / "run/classifier.pth")
    said = capsys.readouterr().out
    assert "loaded the classifier" in said
    assert "missing" not in said
    with pytest.raises(ConfigError, match=r"student_args.embed_dim=48 contradicts the student file"):
        finetune(
            **options(
                folders,
                out=tmp_path / "x",
                student=str(tmp_path / "s.pth"),
                cfg_options={"student_args": dict(embed_dim=48)},
            )
        )
    (tmp_path / "b.onnx").write_bytes(b"\x08\x07\x12")
    with pytest.raises(CheckpointError) as error:
        finetune(**options(folders, out=tmp_path / "x", student=str(tmp_path / "b.onnx")))
    assert "weights_only" not in str(error.value)


def test_augmentation_is_timms_and_survives_zero_bits(folders):
    """RandAugment posterizes to 0 bits now and then: a black photo, as timm says of itself, not an error."""
    from timm.data import auto_augment

    transform = train_transform(load_recipe("finetune_base", {"img_size": 32}))
    assert "RandAugment" in repr(transform)
    photo = Image.open(next((folders / "train/red").iterdir()))
    assert not np.asarray(auto_augment.NAME_TO_OP["PosterizeIncreasing"](photo, 0)).any()
    assert np.asarray(auto_augment.NAME_TO_OP["PosterizeIncreasing"](photo, 8)).any()
    assert eval_transform(224)(photo).shape == (3, 224, 224)


def test_damaged_photo_is_replaced_with_its_neighbours_label(folders):
    from tinymim.data.labelled import LabelledPhotos

    files = [folders / "missing.png", next((folders / "train/red").iterdir())]
    item = LabelledPhotos(files, [0, 2], eval_transform(32))[(0, 0)]
    assert (int(item["label"]), item["skipped"]) == (2, [str(files[0])])


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(data="nowhere"), DataError, "no folder"),
        (dict(recipe="mae_tiny"), ConfigError, "tinymim pretrain runs such recipes"),
        (
            dict(recipe="finetune_star_tiny", cfg_options={"teacher": ""}),
            ConfigError,
            "has a distillation token but no teacher",
        ),
        (dict(batch_size=9, cfg_options={"mixup": 0.8}), ConfigError, "mixed"),
        (dict(teacher="timm/nothing"), ConfigError, "timm has no model"),
        (dict(student="nowhere.pth"), CheckpointError, "no checkpoint"),
        (dict(lr=float("nan")), ConfigError, "the rate is nan"),
        (dict(lr=0), ConfigError, "the rate is 0"),
        (dict(max_steps=0), ConfigError, "at least one step"),
        (dict(epochs=0), ConfigError, r"--epochs N"),
        (dict(cfg_options={"layer_decay": 0}), ConfigError, r"from 0 to 1 \(not 0\)"),
        (dict(cfg_options={"drop_path": 1.5}), ConfigError, "drop_path=1.5"),
        (dict(cfg_options={"ema": 2}), ConfigError, "ema=2"),
        (dict(cfg_options={"alpha": 2}), ConfigError, "alpha=2"),
        (dict(cfg_options={"aa": "foo"}), ConfigError, "timm does not know this augmentation"),
        (dict(out="/proc/nowhere/x"), ConfigError, "cannot create the folder"),
        (dict(cfg_options={"distillation": "warm"}), ConfigError, "one of hard, soft"),
        (dict(cfg_options={"crop_scale": [0.5]}), ConfigError, "two numbers are needed"),
        (dict(cfg_options={"crop_scale": [0.9, 0.1]}), ConfigError, "least <= most"),
        (dict(cfg_options={"betas": [0.9]}), ConfigError, "two numbers are needed"),
        (dict(cfg_options={"micro_batch": -3}), ConfigError, "micro_batch=-3"),
        (dict(cfg_options={"warmup_epochs": -1}), ConfigError, "warmup_epochs=-1"),
        (dict(cfg_options={"mixup_prob": 2}), ConfigError, "mixup_prob=2"),
        (dict(cfg_options={"aa": "foo"}, dry_run=True), ConfigError, "timm does not know this augmentation"),
        (dict(cfg_options={"layer_dekay": 0.5}), ConfigError, "did you mean 'layer_decay'"),
    ],
)
def test_bad_input(folders, tmp_path, change, kind, words):
    more = options(folders, **{"out": tmp_path / "run"} | {k: v for k, v in change.items() if k != "recipe"})
    with pytest.raises(kind, match=words):
        finetune(change.get("recipe", "finetune_tiny"), **more)
    assert not (tmp_path / "run").exists()


def test_teacher_of_other_classes_is_refused(folders, tmp_path):
    save_classifier(Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 7), tmp_path / "c.pth", "abcdefg")
    with pytest.raises(ConfigError, match="has 7 classes, the photos have 3"):
        finetune(**options(folders, out=tmp_path / "run", teacher=str(tmp_path / "c.pth")))


def test_the_classes_of_a_teacher_are_compared(folders, tmp_path, monkeypatch):
    """As many classes are not the same ones; of ImageNet's 1000 those that the photos are of teach."""
    network = Classifier(ViT(img_size=32, embed_dim=24, depth=1, num_heads=2), 3)
    save_classifier(network, tmp_path / "c.pth", ["blue", "red", "green"])
    with pytest.raises(ConfigError, match="are not those of the photos") as error:
        finetune(**options(folders, out=tmp_path / "run", teacher=str(tmp_path / "c.pth")))
    assert "where it has 'red' they have 'green'" in str(error.value)
    whole = timm.create_model("resnet10t", num_classes=1000).eval()
    monkeypatch.setattr(logit_teacher, "_create_timm", lambda *args, **kwargs: whole)
    found = load_label_teacher("timm/resnet10t", ["n01440764", "n01534433"], index=[0, 13])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.model(images), whole(images)[:, [0, 13]])
    for classes in ([*CLASSES], [str(i) for i in range(1000)]):
        with pytest.raises(ConfigError, match="not named as ImageNet's"):
            load_label_teacher("timm/resnet10t", classes)


def test_a_damaged_photo_is_no_score(folders, tmp_path, capsys):
    """Its neighbour is not counted in its place, and it is named."""
    shutil.copytree(folders / "val", tmp_path / "val")
    (tmp_path / "val/green/0.png").write_bytes(b"no photo")
    result = finetune(**options(folders, out=tmp_path / "run", val_data=tmp_path / "val", epochs=1, workers=1))
    assert result.photos == 11
    assert round(result.top1 * 11) == pytest.approx(result.top1 * 11, abs=1e-5)
    said = capsys.readouterr().out
    assert "1 damaged photo(s) left out of the score" in said
    assert "green/0.png" in said


@pytest.mark.slow
def test_two_processes_equal_one(folders, tmp_path):
    """torchrun with gloo, with a running average: the same losses and scores, every photo scored once."""
    words = [
        "finetune",
        "--data",
        str(folders / "train"),
        "--val-data",
        str(folders / "val"),
        "--img-size",
        "32",
        "--batch-size",
        "12",
        "--epochs",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--cfg-options",
        "mixup=0",
        "cutmix=0",
        "ema=0.9",
        "drop_path=0.0",
        "crop_scale=[0.5,1.0]",
        *(f"student_args.{key}={value}" for key, value in SMALL["student_args"].items()),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tinymim"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run([*launch, *words, "--out", str(tmp_path / "two")], env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-3000:]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    a, b = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert (a["photos"], a["top1"]) == (12, pytest.approx(b["top1"], abs=1e-6))
    for left, right in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)


def test_fewer_photos_to_score_than_processes(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymim.engine.job.join_processes", lambda *_: (0, 13))
    with pytest.raises(ConfigError, match="12 photos to score and 13 processes"):
        finetune(**options(folders, out=tmp_path / "run", batch_size=13))


def test_command_dry_run_and_eval(folders, tmp_path, capsys):
    """The command in a process of its own; then --dry-run and --print-config in this one."""
    words = [
        "--data",
        str(folders / "train"),
        "--val-data",
        str(folders / "val"),
        "--img-size",
        "32",
        "--batch-size",
        "12",
        "--epochs",
        "2",
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    small = ["--cfg-options", "student_args.depth=2", "student_args.embed_dim=24", "student_args.num_heads=2"]
    code = fork(lambda: main(["finetune", *words, "--out", str(tmp_path / "run"), *small]), tmp_path / "said.txt")
    said = (tmp_path / "said.txt").read_text()
    assert code == 0, said
    assert "top-1" in said
    assert "next:    tinymim eval" in said
    assert (tmp_path / "run/report.html").is_file()
    assert main(["finetune", *words, "--dry-run", "--out", str(tmp_path / "dry"), *small]) == 0
    said = capsys.readouterr().out
    assert "hours on one cpu like this" in said
    assert "GFLOP per image" in said
    assert not (tmp_path / "dry").exists()
    assert main(["finetune", "--recipe", "finetune_base", "--print-config", "--model", "tinymim_vit_small"]) == 0
    out = capsys.readouterr().out
    assert "layer_decay = 0.65" in out
    assert "student = 'tinymim_vit_small'" in out


def test_an_error_in_a_worker_does_not_hang(folders, tmp_path, monkeypatch):
    """Workers ignore SIGTERM; a job that dies of an unforeseen error must still end (it once waited for them)."""
    words = [
        "finetune",
        "--data",
        str(folders / "train"),
        "--img-size",
        "32",
        "--batch-size",
        "12",
        "--workers",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "--cfg-options",
        "student_args.depth=1",
        "student_args.embed_dim=24",
        "student_args.num_heads=2",
    ]

    def broken(image):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(finetuning, "train_transform", lambda config: broken)
    done = run(["tinymim", *words], tmp_path, seconds=90)
    assert done.word == TRACEBACK
    assert "unforeseen" in done.text


def test_weights_that_are_given_stay(folders, tmp_path):
    """Of an encoder and a teacher of timm, whose classes have an init_weights that MMEngine's Runner would call."""
    torch.manual_seed(1)
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=2)
    taught_by = timm.create_model("test_vit", num_classes=3)
    for name, model in (("encoder", encoder), ("teacher", taught_by)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    seen = {}

    def note(self, runner, batch_idx, data_batch=None):
        seen.update({name: value.clone() for name, value in runner.model.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CosineHook, "before_train_iter", note)
        more = dict(
            teacher="timm/test_vit", teacher_weights=str(tmp_path / "teacher.pth"), student=tmp_path / "encoder.pth"
        )
        result = finetune(**options(folders, **more, out=tmp_path / "run", max_steps=1, lr=1e-30) | {"cfg_options": {}})
    written = load_classifier(result.classifier)[0].state_dict()
    for name, value in encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(seen[f"network.backbone.{name}"], value)
            torch.testing.assert_close(written[f"backbone.{name}"], value, rtol=0, atol=1e-25)
    for name, value in taught_by.state_dict().items():
        assert torch.equal(seen[f"teacher.{name}"].float(), value.to(seen[f"teacher.{name}"].dtype).float())


def test_crops_are_decoded_no_finer_than_needed(folders, tmp_path, monkeypatch):
    """The crop of a large JPEG is that of the whole photo, from an eighth of its pixels; the key alone draws it."""
    photo = tmp_path / "large.jpg"
    Image.open(folders / "train/red/0.png").resize((1024, 768), Image.Resampling.BICUBIC).save(photo, quality=95)
    drafted, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *a: drafted.append(draft(*a)) or drafted[-1])
    crops = LabelledPhotos([photo], [2], to_tensor, 3, (32, (0.9, 1.0)))
    item = crops[(0, 0)]
    assert (item["image"].shape, int(item["label"]), item["skipped"]) == ((3, 32, 32), 2, [])
    assert drafted[0][1][2] == 128  # of 1024
    assert torch.equal(item["image"], crops[(0, 0)]["image"])
    assert not torch.equal(item["image"], crops[(1, 0)]["image"])
    box = crop_box((1024, 768), (0.9, 1.0), random.Random("3/0/0"))
    exact = to_tensor(open_photo(photo).resize((32, 32), Image.Resampling.BICUBIC, box=box))
    assert (item["image"].float() - exact.float()).abs().mean() < 1.5
    photo.write_bytes(photo.read_bytes()[:200])
    pair = LabelledPhotos([photo, folders / "train/red/1.png"], [2, 1], to_tensor, 3, (32, (0.9, 1.0)))[(0, 0)]
    assert (pair["skipped"], int(pair["label"])) == ([str(photo)], 1)


def test_validation_keeps_its_workers(folders, tmp_path, monkeypatch):
    """One start for all validations, and none is left at the end or after an error."""
    started, made = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__

    def note(self, loader):
        made(self, loader)
        started.append(self)

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__", note)
    result = finetune(**options(folders, out=tmp_path / "run", workers=1, max_steps=4, cfg_options={"val_every": 1}))
    assert len([r for r in records(result.out) if "val_top1" in r]) == 5
    assert len(started) == 2  # training and validation
    monkeypatch.setattr(ClassifyModel, "_scores", staticmethod(lambda *a: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        finetune(**options(folders, out=tmp_path / "bad", workers=1, max_steps=4))
    assert not any(worker.is_alive() for each in started for worker in each._workers)


def test_few_photos_of_each_class(folders, tmp_path):
    """As many of each class as the recipe says, the same for the same seed."""
    whole = read_class_folder(folders / "train")
    few, again, other = (whole.some(2, seed) for seed in (0, 0, 1))
    assert [int((few.labels == i).sum()) for i in range(len(few.classes))] == [2] * len(few.classes)
    assert few.files == again.files != other.files
    assert few.files == sorted(few.files, key=whole.files.index)
    assert whole.some(10_000, 0).files == whole.files
    run = options(folders, out=tmp_path / "run", max_steps=1, batch_size=4, cfg_options={"photos_per_class": 2})
    finetune(**run)
    assert read_env(tmp_path / "run")["inputs"]["data"]["files"] == 2 * len(few.classes)
