"""Fast distillation: from a store that ``tinymim cache`` wrote and beside the teacher, resumed, and refused."""

import json
import shutil

import pytest
import torch

from tests.attack.kills import logged
from tests.engine.processes import launch
from tests.export.photographs import photograph
from tinymim.cli import main
from tinymim.distill import TargetStore
from tinymim.engine import distill, evaluate_classifier, finetune, load_recipe
from tinymim.engine.recipe import FOLDER
from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.models import ViT, create_model, load_weights
from tinymim.models.classifier import Classifier, load_classifier, save_classifier

RECIPE = """
_base_ = "{base}"
student = "tinymim_vit_tiny"
student_args = dict(depth=1, embed_dim=24, num_heads=2)
img_size = 32
batch_size = 4
warmup_epochs = 0
epochs = 2
precision = "fp32"
watch_every = 0
workers = 0
seed = 5
"""
TINY = dict(embed_dims=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_sizes=[2, 2, 2, 2])
CLASSES = [f"class{i}" for i in range(9)]
MIXED = ("--mixup", "0.8", "--cutmix", "1.0")


@pytest.mark.parametrize(("size", "drop_path"), [("5m", 0.0), ("11m", 0.0), ("21m", 0.1)])
def test_recipes_hold_published_numbers(size, drop_path):
    """On 22k those of the published distillation; from any store the rate of training on 1k from labels."""
    names = ("batch_size", "epochs", "warmup_epochs", "weight_decay", "clip_grad", "drop_path", "student")
    for kind, peak, final, wanted in (
        ("22k", 2e-3, 4e-5, (4096, 90, 5, 0.01, 5.0)),
        ("from_store", 1e-3, 1e-5, (1024, 300, 20, 0.05, 5.0)),
    ):
        recipe = load_recipe(f"tinyvit_{size}_{kind}")
        assert tuple(recipe[name] for name in names) == (*wanted, drop_path, f"tiny_vit_{size}_224")
        assert (recipe.base_lr * recipe.batch_size / 256, recipe.min_lr) == pytest.approx((peak, final))
        assert (tuple(recipe.betas), tuple(recipe.crop_scale)) == ((0.9, 0.999), (0.08, 1.0))
    recipe = load_recipe(f"tinyvit_{size}_22k")
    assert (recipe.topk, recipe.classes, recipe.mixup, recipe.cutmix) == (100, 21841, 0.0, 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos in two folders, a teacher of nine classes, a recipe, and the stores of both kinds of views."""
    folder = tmp_path_factory.mktemp("fast")
    for i in range(13):  # an odd one has no partner
        path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i, (40 + i, 50)).save(path)
    torch.manual_seed(0)
    teacher = Classifier(ViT(img_size=32, embed_dim=32, depth=1, num_heads=2), len(CLASSES))
    torch.nn.init.normal_(teacher.head.weight)
    save_classifier(teacher, folder / "teacher.pth", CLASSES)
    (folder / "recipe.py").write_text(RECIPE.format(base=FOLDER / "tinyvit_5m_from_store.py"))
    for name, more in (("store", ()), ("mixed", MIXED)):
        cache(folder, name, *more)
    return folder


def cache(folder, name, *more):
    words = ["--teacher", folder / "teacher.pth", "--data", folder / "photos", "--out", folder / name, "--topk", 4]
    words += ["--epochs", 2, "--img-size", 32, "--seed", 5, "--workers", 0, "--device", "cpu", *more]
    assert main(["cache", *map(str, words)]) == 0


def run(made, out, store=None, **more):
    options = dict(data=made / "photos", device="cpu", lr=0.01, out=out)
    return distill(str(made / "recipe.py"), **options | ({} if store is None else dict(store=made / store)) | more)


def losses(result):
    return [line["logits"] for line in logged(result.metrics) if "logits" in line]


@pytest.fixture(scope="module")
def stored(made):
    return run(made, made / "run", "mixed", save_every=3)


def test_a_store_teaches_what_the_teacher_would(made, stored, tmp_path):
    """Within the rounding of the stored halves: the same views, pairs, order, initial weights."""
    live = dict(topk=4, mixup=0.8, cutmix=1.0)
    beside = run(made, tmp_path / "live", teacher=str(made / "teacher.pth"), cfg_options=live)
    assert losses(stored) == pytest.approx(losses(beside), abs=2e-4)
    assert losses(stored) != losses(beside)  # one is rounded
    assert losses(stored)[-1] < losses(stored)[0] - 0.2
    other = run(made, tmp_path / "other", teacher=str(made / "teacher.pth"), cfg_options=live | dict(mixup=0.1))
    assert losses(stored) != pytest.approx(losses(other), abs=2e-3)


def test_killed_and_resumed_on_any_number_of_workers(made, stored, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stored.out, folder)
    (folder / "checkpoints/step_00000006.pth").unlink()
    shutil.copytree(made / "mixed", tmp_path / "moved")
    again = run(made, folder, store=tmp_path / "moved", save_every=3, resume=True, workers=2)
    assert again.student.read_bytes() == stored.student.read_bytes()
    assert logged(again.metrics) == logged(stored.metrics)
    (folder / "checkpoints/step_00000006.pth").unlink()
    cache(made, "seed6", *MIXED, "--seed", 6)
    with pytest.raises(ConfigError, match="started with another store"):
        run(made, folder, "seed6", save_every=3, resume=True)


def test_the_student_is_a_classifier_for_other_commands(made, stored, tmp_path, capsys):
    meta = torch.load(stored.student, weights_only=True)["meta"]
    assert (meta["teacher"], meta["method"], meta["classes"]) == ("teacher.pth", "fast_distill", CLASSES)
    assert json.loads((stored.out / "env.json").read_text())["inputs"]["store"]["file"].endswith("mixed")
    network, _ = load_classifier(stored.student)
    assert network.num_classes == 9
    assert float(network.head.weight.detach().abs().max()) > 1e-3  # it was trained
    encoder = create_model("tinymim_vit_tiny", img_size=32, depth=1, embed_dim=24, num_heads=2)
    load_weights(encoder, stored.student)  # as segment does: without the head
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, network.backbone.blocks[0].attn.qkv.weight)
    tuned = finetune(
        data=made / "photos",
        student=stored.student,
        img_size=32,
        batch_size=4,
        max_steps=1,
        workers=0,
        device="cpu",
        out=tmp_path / "tuned",
    )
    assert tuned.classes == 2
    for name, label in (("a", "class0"), ("b", "class1")):
        (tmp_path / "labelled").mkdir(exist_ok=True)
        (tmp_path / "labelled" / label).symlink_to(made / "photos" / name)
    scored = evaluate_classifier(stored.student, data=tmp_path / "labelled", workers=0, device="cpu")
    assert scored.scores["imagenet"]["photos"] == 13
    more = run(
        made, tmp_path / "more", "store", teacher=str(made / "teacher.pth"), init_from=stored.student, max_steps=1
    )
    assert losses(more)[0] < losses(stored)[0] - 0.1  # head and all
    capsys.readouterr()
    run(made, tmp_path / "less", "store", init_from=tuned.classifier, max_steps=1)
    assert "no head of 9 classes: the student's starts new" in capsys.readouterr().out


def test_a_tinyvit_from_a_store(made, tmp_path):
    """Batch norm in training mode, attention biases without weight decay, statistics restored on resume."""
    plain = RECIPE.partition("\nstudent =")[0] + RECIPE.partition("num_heads=2)")[2]
    recipe = plain.format(base=FOLDER / "tinyvit_5m_from_store.py") + f"student_args = {TINY}\n"
    (tmp_path / "recipe.py").write_text(recipe)
    (tmp_path / "photos").symlink_to(made / "photos")
    words = dict(store=made / "store", lr=0.003, save_every=3)
    whole = run(tmp_path, tmp_path / "whole", **words)
    assert losses(whole)[-1] < losses(whole)[0]
    (whole.out / "checkpoints/step_00000006.pth").unlink()
    before = whole.student.read_bytes()
    assert run(tmp_path, whole.out, **words, resume=True).student.read_bytes() == before
    assert load_classifier(whole.student)[0].num_classes == 9
    state = torch.load(whole.student, weights_only=True)["model"]
    assert "head.fc.weight" in state
    assert int(state["patch_embed.conv1.bn.num_batches_tracked"]) == 6  # none of measuring memory


@pytest.mark.parametrize(
    ("store", "more", "words"),
    [
        (None, {}, "neither a store nor a teacher"),
        ("nowhere", {}, "no target store"),
        ("photos", {}, "no target store"),
        ("store", dict(teacher="timm/vit_tiny_patch16_224"), "made with the teacher teacher.pth"),
        ("store", dict(teacher="other/teacher.pth"), r"made with the teacher teacher.pth \(sha256"),
        ("store", dict(cfg_options=dict(topk=5)), "made with topk 4"),
        ("store", dict(cfg_options=dict(classes=1000)), "made with classes 9"),
        ("store", dict(img_size=64), "use --img-size 32,"),
        ("store", dict(cfg_options=dict(crop_scale=(0.5, 1.0))), r"crop_scale=\[0.08,1.0\]"),
        ("store", dict(cfg_options=dict(rand_augment="m5")), "made with rand_augment m9-"),
        ("store", dict(cfg_options=dict(erasing=0.0)), "erasing=0.25"),
        ("store", dict(cfg_options=dict(mixup=0.8)), "made with mixup 0.0"),
        ("store", dict(epochs=3), "use --epochs 2, or write more"),
        ("store", dict(val_data="photos"), "leave --val-data out"),
        ("store", dict(cfg_options=dict(color_jitter=0.4)), "color_jitter=0"),
        ("mixed", dict(batch_size=3), "use --batch-size 2"),
        ("store", dict(data="others"), "1 of 2 photos, e.g. a/new.png, are not in it, which has 13"),
        ("mixed", dict(data="fewer"), "mixes its 13 photos in pairs, and --data has 2"),
        (None, dict(teacher="teacher.pth", cfg_options=dict(topk=10)), "it has 9 classes"),
        (None, dict(teacher="teacher.pth", cfg_options=dict(classes=8)), "it has 9 classes"),
        ("official", {}, "cannot be made again"),
        ("vectors", {}, "holds no logits"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(made, store, more, words, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).symlink_to(path)
    for kind in ("others", "fewer"):
        for name in ("0.png", "new.png" if kind == "others" else "2.png"):
            (folder / kind / "a").mkdir(parents=True, exist_ok=True)
            photograph(1).save(folder / kind / "a" / name)
    for name, change in (("official", {"augmentation": {"kind": "TinyViT's"}}), ("vectors", {"kind": "vectors"})):
        shutil.copytree(made / "store", folder / name)
        header = json.loads((folder / name / "store.json").read_text()) | change
        (folder / name / "store.json").write_text(json.dumps(header))
    paths = {key: str(folder / value) for key, value in more.items() if key in ("data", "val_data")}
    if str(more.get("teacher")).endswith("teacher.pth"):
        paths["teacher"] = str(folder / more["teacher"])
        (folder / "other").mkdir()
        save_classifier(
            Classifier(ViT(img_size=32, embed_dim=32, depth=1, num_heads=2), 9), folder / "other/teacher.pth", CLASSES
        )
    with pytest.raises(TinyMIMError, match=words):
        run(folder, tmp_path / "run", store, **more | paths)
    assert not (tmp_path / "run").exists()


def test_a_store_for_a_recipe_of_another_method(made):
    with pytest.raises(DataError, match="holds no relations") as found:
        distill(data=made / "photos", store=made / "store")
    assert "--recipe tinyvit_5m_from_store" in found.value.fix
    with pytest.raises(ConfigError, match="unknown key 'store' in a dmae recipe"):
        distill(recipe="dmae_tiny_from_mae_base", data=made / "photos", store=made / "store")


def test_packed_photos_are_the_same_photos(made, stored, tmp_path):
    """The keys of photos in shards are their paths below the folder that was packed."""
    assert main(["data", "--pack", str(made / "photos"), "--out", str(tmp_path / "shards")]) == 0
    packed = run(made, tmp_path / "run", "mixed", data=tmp_path / "shards", save_every=3)
    assert losses(packed) == losses(stored)


def test_some_of_the_photos_of_a_store(made, tmp_path):
    """Without mixing a run may use fewer; a photo that is damaged now is replaced."""
    shutil.copytree(made / "photos/a", tmp_path / "photos/a")
    (tmp_path / "photos/a/4.png").write_bytes(b"no photo")
    result = run(made, tmp_path / "run", "store", data=tmp_path / "photos", batch_size=6)
    assert result.skipped == {str(tmp_path / "photos/a/4.png"): 2}
    assert result.steps == 2


def test_photos_that_were_damaged_when_the_store_was_made(made, tmp_path, capsys):
    shutil.copytree(made / "photos", tmp_path / "photos")
    good = (tmp_path / "photos/a/4.png").read_bytes()
    (tmp_path / "photos/a/4.png").write_bytes(b"no photo")
    shutil.copy(made / "teacher.pth", tmp_path)
    cache(tmp_path, "store")
    (tmp_path / "photos/a/4.png").write_bytes(good)
    result = run(made, tmp_path / "run", data=tmp_path / "photos", store=tmp_path / "store")
    assert list(result.skipped) == [str(tmp_path / "photos/a/4.png")]


def test_values_that_are_no_probabilities(made, tmp_path):
    """A store of ours is trusted no further than its checksum."""
    from tinymim.distill.stored_logits import StoredLogits

    found = StoredLogits(TargetStore.open(made / "store"))
    found.classes = 3
    with pytest.raises(TinyMIMError, match="no probabilities of 3 classes"):
        [found(key, 0) for key in found.store.keys]


def test_dry_run_and_command_line(made, tmp_path, capsys):
    words = ["distill", "--recipe", str(made / "recipe.py"), "--store", str(made / "store"), "--data"]
    words += [str(made / "photos"), "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*words, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    assert main([*words, "--max-steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "tinymim segment" in said
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(made, stored, tmp_path):
    def work(rank):
        run(made, tmp_path / "run", "mixed", save_every=3)

    ended = launch(2, work, tmp_path / "said")
    assert [each.code for each in ended] == [0, 0], ended
    found = [line["logits"] for line in logged(tmp_path / "run/metrics.jsonl") if "logits" in line]
    assert found == pytest.approx(losses(stored), rel=1e-5)
