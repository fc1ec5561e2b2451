"""Hierarchical students by command: fine-tuning, scores, resume, processes, and on to a segmentor in INT8."""

import json
import os

import pytest
import torch

import tinymim
from tests.attack.kills import logged
from tests.engine.power_cut import power_cut
from tests.engine.processes import launch
from tests.engine.test_hierarchical import SMALL as DISTILLED
from tests.seg.test_contract import options as small_segmentor
from tinymim.cli import main
from tinymim.demo.scenes import write_scenes
from tinymim.engine import finetune, load_recipe
from tinymim.engine.loop import StepLoop
from tinymim.errors import ConfigError
from tinymim.models import save_student
from tinymim.models.classifier import Classifier, load_classifier, save_classifier

TINY = "tiny_vit_5m_224"
SHAPE = dict(embed_dims=(16, 32, 64, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
COMMON = dict(img_size=64, batch_size=4, max_steps=4, save_every=2, workers=0, device="cpu")


def words(options):
    return [f"{key}={value}".replace(" ", "") for key, value in options.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three classes of coloured photos, not square, and a classifier that knows two of them in another order."""
    from PIL import Image

    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in (("blue", (40, 60, 200)), ("green", (40, 190, 60)), ("red", (210, 50, 40))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (90, 70), tuple(c + 9 * i for c in colour)).save(root / split / name / f"{i}.png")
    torch.manual_seed(0)
    network = Classifier(tinymim.create_model(TINY, img_size=64, **SHAPE), 3)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand_like(value))
    save_classifier(network, root / "c.pth", ["red", "grey", "blue"])
    return root


def test_tinyvits_recipes_are_the_authors():
    """Their config.py and yaml files; rates for a batch of 1024, of which they give those of 512."""
    scratch, down, wide, wider = (load_recipe(f"tinyvit_{x}") for x in ("5m_1k", "21m_22k_to_1k", "21m_384", "21m_512"))
    assert (scratch.base_lr * 4, scratch.min_lr, scratch.epochs, scratch.warmup_epochs) == (1e-3, 1e-5, 300, 20)
    assert (down.base_lr * 4, down.min_lr, down.epochs, down.warmup_epochs) == (5e-4, 2e-5, 30, 5)
    assert (wide.base_lr * 4, wide.min_lr, wide.epochs, wide.warmup_epochs) == (4e-5, 4e-7, 30, 5)
    for recipe in (scratch, down, wide, wider):
        assert (recipe.batch_size, recipe.clip_grad, recipe.smoothing, recipe.aa) == (1024, 5.0, 0.1, scratch.aa)
    assert (scratch.weight_decay, scratch.layer_decay, scratch.mixup, scratch.cutmix) == (0.05, 1.0, 0.8, 1.0)
    assert (down.weight_decay, down.layer_decay, down.mixup, down.cutmix) == (1e-8, 0.8, 0.0, 0.0)
    assert (wide.layer_decay, wide.eval_squash, wide.img_size, wider.img_size) == (1.0, True, 384, 512)
    assert (scratch.head, scratch.frozen_bn) == (None, None)
    assert {(recipe.head, recipe.frozen_bn) for recipe in (down, wide, wider)} == {("by_class", True)}
    rates = {"1k": (0.0, 0.1, 0.2), "22k_to_1k": (0.0, 0.0, 0.1), "384": (0.0, 0.0, 0.1), "512": (0.0, 0.0, 0.1)}
    for kind, expected in rates.items():
        assert tuple(load_recipe(f"tinyvit_{size}_{kind}").drop_path for size in ("5m", "11m", "21m")) == expected
    for size, windows in ((384, (12, 12, 24, 12)), (512, (16, 16, 32, 16))):  # of timm's tiny_vit_21m_384 and _512
        for model in ("5m", "11m"):
            assert tuple(load_recipe(f"tinyvit_{model}_{size}").student_args["window_sizes"]) == windows
        assert load_recipe(f"tinyvit_21m_{size}").student == f"tiny_vit_21m_{size}"


def test_from_a_classifier_of_other_classes_to_scores(folders, tmp_path, capsys):
    """The student's file decides the model; its rows, norm and running statistics are where the run starts."""
    run, student = tmp_path / "run", folders / "c.pth"
    line = ["finetune", "--recipe", "tinyvit_5m_384", "--student", str(student), "--data", str(folders / "train")]
    line += ["--val-data", str(folders / "val"), "--out", str(run), "--img-size", "64", "--batch-size", "4"]
    line += ["--max-steps", "1", "--device", "cpu", "--workers", "0"]
    assert main([*line, "--cfg-options", "student_args.window_sizes=(8,8,16,7)"]) == 0
    said = capsys.readouterr().out
    assert f"2 of 3 classes start from their rows in {student}; 1 start from their mean" in said
    assert "resized: stages.1.blocks.0.attn.attention_biases" in said
    assert f"next:    tinymim segment upernet_tinyvit_5m --data-root FOLDER --student {run}/classifier.pth" in said
    tuned, file = load_classifier(run / "classifier.pth")
    assert (file.meta["eval_squash"], file.meta["classes"]) == (True, ["blue", "green", "red"])
    assert tuned.backbone.config["window_sizes"] == (8, 8, 16, 7)
    before = load_classifier(student)[0]
    for key, value in before.state_dict().items():
        assert "running" not in key or torch.equal(value, tuned.state_dict()[key]), key
    first = "backbone.stages.0.blocks.0.conv1.conv.weight"
    assert not torch.equal(before.state_dict()[first], tuned.state_dict()[first])
    top1 = json.loads((run / "result.json").read_text())["top1"]
    evaluate = ["eval", str(run / "classifier.pth"), "--data", f"{folders}/val", "--workers", "0", "--device", "cpu"]
    for more in ([], ["--no-squash"]):
        capsys.readouterr()
        assert main([*evaluate, *more]) == 0
        said = capsys.readouterr().out
        assert more or f"top-1 {100 * top1:.2f}" in said
        assert f"--data {folders}/val{' --no-squash' if more else ''} --workers 0" in said


def test_a_head_needs_a_student(folders, tmp_path):
    with pytest.raises(ConfigError, match="head=by_class without a student"):
        finetune("tinyvit_5m_22k_to_1k", data=folders / "train", out=tmp_path / "run", **COMMON)
    assert not (tmp_path / "run").exists()


def options(folders, out, **more):
    cfg = {"student_args": SHAPE, "drop_path": 0.2, "ema": 0.9, **more.pop("cfg_options", {})}
    return dict(COMMON, data=folders / "train", val_data=folders / "val", out=out, cfg_options=cfg, **more)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_resume_is_exact_with_batch_norm(folders, tmp_path, monkeypatch, frozen):
    """Running statistics, their average, clipping: killed after the third step and resumed, the same bytes."""

    def run(folder, **more):
        given = options(folders, tmp_path / folder, cfg_options={"frozen_bn": frozen}, **more)
        return finetune("tinyvit_5m_1k", **given)

    whole = run("whole")
    with power_cut(monkeypatch, 4):
        run("cut")
    resumed = run("cut", resume=True)
    assert resumed.classifier.read_bytes() == whole.classifier.read_bytes()
    assert logged(resumed.metrics) == logged(whole.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_keep_one_model(folders, tmp_path, strategy):
    """Batch norm's running statistics are the same in both, so that a resumed run goes on as it would have."""

    def run(folder, **more):
        chosen = {"cfg_options": {"precision": "fp32"}, "strategy": strategy, **more}
        return finetune("tinyvit_5m_1k", **options(folders, tmp_path / folder, **chosen))

    def cut(folder):
        step, taken = StepLoop.run_iter, []

        def stop(self, *args, **kwargs):
            taken.append(1)
            if len(taken) == 3:
                os._exit(7)
            return step(self, *args, **kwargs)

        StepLoop.run_iter = stop
        run(folder)

    ended = launch(2, lambda _: run("whole") and 0, tmp_path / "said", seconds=200)
    assert [each.code for each in ended] == [0, 0], ended[0].text
    assert {each.code for each in launch(2, lambda _: cut("cut"), tmp_path / "said", seconds=200)} == {7}
    ended = launch(2, lambda _: run("cut", resume=True) and 0, tmp_path / "said", seconds=200)
    assert [each.code for each in ended] == [0, 0], ended[0].text
    a, b = (torch.load(tmp_path / name / "classifier.pth", weights_only=True)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert logged(tmp_path / "whole/metrics.jsonl") == logged(tmp_path / "cut/metrics.jsonl")


HIERA = "hiera_tiny_from_hiera_base"
CHAIN = {  # timm's name -> --cfg-options of the recipe that makes such a student (None: it is saved as it is), config
    "hiera_tiny_224": (DISTILLED[HIERA], "upernet_hiera_tiny_camvid"),
    TINY: (None, "upernet_tinyvit_5m_light_camvid"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAIN)
def test_from_student_to_int8(name, folders, tmp_path, capsys):
    """Pre-train, fine-tune, score, segment, export and quantise, each from the file that the last one wrote."""
    made, config = CHAIN[name]
    data, student = write_scenes(tmp_path / "scenes", train=8, val=2, size=(96, 80)), tmp_path / "pre/student.pth"
    if made is None:
        student.parent.mkdir()
        save_student(tinymim.create_model(name, img_size=64, **SHAPE), student)
    else:
        line = ["pretrain", "--recipe", "mae_hiera_tiny", "--data", f"{folders}/train", "--out", str(student.parent)]
        line += ["--img-size", "64", "--batch-size", "4", "--max-steps", "2", "--device", "cpu", "--workers", "0"]
        assert main([*line, "--cfg-options", *words(made)]) == 0
    device = ["--device", "cpu"]
    line = ["finetune", "--student", str(student), "--data", f"{folders}/train", "--val-data", f"{folders}/val"]
    line += ["--img-size", "64", "--batch-size", "4", "--max-steps", "2", "--workers", "0"]
    line += ["--out", str(tmp_path / "tuned")]
    assert main([*line, *device]) == 0
    assert f"{student} is {name}, which is used, not tinymim_vit_tiny" in capsys.readouterr().out
    classifier = str(tmp_path / "tuned/classifier.pth")
    assert main(["eval", classifier, "--data", f"{folders}/val", "--workers", "0", *device]) == 0
    changes = small_segmentor()
    line = ["segment", config, "--data-root", str(data), "--student", classifier, *device]
    assert main([*line, "--work-dir", str(tmp_path / "seg"), "--cfg-options", *words(changes)]) == 0
    assert main([*line, "--dry-run", "--cfg-options", *words(changes)]) == 0
    assert "images of 64x64" in capsys.readouterr().out

    import onnx

    from tinymim_export import export
    from tinymim_export.precision.quantize import quantize

    photos = data / "images" / "training"
    for part, file in (("segmentor", tmp_path / "seg/segmentor.pth"), ("classifier", classifier)):
        fixed = export(file, tmp_path / f"{part}.onnx", part=part, size=(64, 64))
        assert fixed.parity.passed
        assert "BatchNormalization" not in {node.op_type for node in onnx.load(fixed.onnx).graph.node}  # folded
        int8 = quantize(fixed.onnx, tmp_path / f"{part}8.onnx", precision="int8", calibration=photos, count=6)
        assert int8.verified, str(int8.parity.rows)
    assert export(classifier, tmp_path / "dynamic.onnx", part="classifier", dynamic=True).parity.passed
