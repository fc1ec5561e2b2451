"""Hierarchical students by command: pre-training, distillation, what is printed, resume, processes, bad input."""

import json

import pytest
import torch

import tinymim
from tests.attack.kills import logged, write_data
from tests.engine.power_cut import power_cut
from tests.engine.processes import launch
from tinymim.cli import main
from tinymim.engine import distill, pretrain
from tinymim.errors import ConfigError
from tinymim.models import ViT, read_checkpoint, save_student

COMMON = dict(img_size=64, batch_size=4, max_steps=4, save_every=2, workers=0, device="cpu")
HIERA, SWIN = "hiera_tiny_from_hiera_base", "d2simmim_swin_tiny_from_swin_small"
BEFORE = {HIERA: "mae_hiera_tiny", SWIN: "simmim_swin_tiny"}  # the recipe whose student teaches
SEGMENT = {HIERA: "upernet_hiera_tiny", SWIN: "upernet_swin_tiny"}
SMALL = {
    HIERA: {"student_args.embed_dim": 16, "student_args.stages": [1, 1, 2, 1], "decoder.dim": 24},
    SWIN: {"student_args.embed_dim": 12, "student_args.depths": [1, 1, 2, 1], "student_args.num_heads": [1, 2, 2, 4]},
}


def words(options):
    return [f"{key}={value}".replace(" ", "") for key, value in options.items()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder / "photos" / "train"


def options(recipe, photos, out):
    return dict(COMMON, data=photos, out=out, cfg_options=dict(SMALL[recipe]))


@pytest.fixture(scope="module")
def teachers(photos, tmp_path_factory):
    """Recipe -> a student of the recipe before it."""
    found = {}
    for recipe, before in BEFORE.items():
        folder = tmp_path_factory.mktemp(before) / "run"
        found[recipe] = pretrain(before, **options(recipe, photos, folder)).student
    return found


@pytest.mark.parametrize("recipe", BEFORE)
def test_from_teacher_to_student(recipe, photos, teachers, tmp_path, capsys):
    """The file holds the encoder in timm's names, and what is typed next is the config and the recipe of its family."""
    line = ["distill", "--recipe", recipe, "--teacher", str(teachers[recipe]), "--data", str(photos), "--val-data"]
    line += [str(photos), "--out", str(tmp_path / "run"), "--img-size", "64", "--batch-size", "4", "--max-steps", "2"]
    line += ["--device", "cpu", "--probe-data", str(photos), "--cfg-options", *words(SMALL[recipe])]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert f"next:    tinymim segment {SEGMENT[recipe]} --data-root FOLDER --student {tmp_path}/run/student.pth" in said
    assert f"next:    tinymim finetune --student {tmp_path}/run/student.pth --data TRAIN --val-data VAL" in said
    assert "sees the whole photo" not in said  # SimMIM's mask token came with the teacher
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"pixel", "attention", "loss"} <= set(row) for row in rows if "lr" in row)
    assert any({"knn_top1", "linear_top1"} <= set(row) for row in rows)
    file = read_checkpoint(tmp_path / "run" / "student.pth")
    assert file.meta["method"] in ("hiera_dmae", "d2simmim")
    assert file.meta["teacher"] == "student.pth"
    again, _ = tinymim.models.model_from_checkpoint(tmp_path / "run" / "student.pth", say=False)
    assert set(again.state_dict()) == set(file.state)
    assert [stage.stride for stage in again.stage_info] == [4, 8, 16, 32]
    for key, value in SMALL[recipe].items():
        name = key.removeprefix("student_args.")
        assert name == key or file.config[name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*BEFORE, *BEFORE.values()])
def test_resume_is_exact(recipe, photos, teachers, tmp_path, monkeypatch):
    """Killed after the third step and resumed: the same bytes, the same losses."""
    first = {before: recipe for recipe, before in BEFORE.items()}

    def run(folder, **more):
        if recipe in first:
            return pretrain(recipe, **options(first[recipe], photos, tmp_path / folder), **more)
        return distill(recipe, teacher=str(teachers[recipe]), **options(recipe, photos, tmp_path / folder), **more)

    whole = run("whole")
    with power_cut(monkeypatch, 4):
        run("cut")
    resumed = run("cut", resume=True)
    assert resumed.student.read_bytes() == whole.student.read_bytes()
    assert logged(resumed.metrics) == logged(whole.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BEFORE)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(recipe, strategy, photos, teachers, tmp_path):
    """Masks follow the photo's place in the batch, and no gradient is waited for in vain."""

    def run(folder, **more):
        given = options(recipe, photos, tmp_path / folder)
        given["cfg_options"]["precision"] = "fp32"
        return distill(recipe, teacher=str(teachers[recipe]), **given, **more)

    one = run("one")
    ended = launch(2, lambda _: run("two", strategy=strategy) and 0, tmp_path / "said")
    assert [each.code for each in ended] == [0, 0], ended[0].text + ended[1].text
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "lr" in line
        ]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    a, b = (torch.load(file, weights_only=True)["model"] for file in (one.student, tmp_path / "two" / "student.pth"))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_a_dry_run_needs_no_teacher_yet(photos, tmp_path, capsys):
    """A model of timm's own width stands in for a file that does not exist."""
    more = options(SWIN, photos, tmp_path / "run")
    distill(SWIN, dry_run=True, teacher=str(tmp_path / "later.pth"), **more)
    assert "stand-in of the next larger size" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "change", "match"),
    [
        (HIERA, dict(img_size=80), "80 x 80 pixels cannot be masked by units of 32"),
        (HIERA, dict(img_size=32), "at least two"),
        (HIERA, dict(teacher="plain"), "the teacher is a ViT"),
        (HIERA, dict(teacher=SWIN), "the teacher is a swin_tiny"),
        (HIERA, dict(more={"teacher_blocks": [9]}), "block 9 does not exist in the teacher"),
        (HIERA, dict(more={"q_pool": 9}), "q_pool=9"),
        (SWIN, dict(more={"mask_patch": 24}), "mask_patch=24"),
        (SWIN, dict(more={"decode_stage": 7}), "decode_stage=7"),
        ("tinymim_tiny_from_mae_base", dict(teacher=SWIN), "the teacher is a Hierarchical"),
        ("dmae_tiny_from_mae_base", dict(teacher=HIERA), "the teacher is a Hierarchical"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_work(recipe, change, match, photos, teachers, tmp_path):
    known = {**teachers, "plain": tmp_path / "plain.pth"}
    save_student(ViT(img_size=64, embed_dim=24, depth=1, num_heads=2), known["plain"])
    teacher = known[change.get("teacher", recipe)]
    given = dict(COMMON, data=photos, out=tmp_path / "run", teacher=str(teacher))
    given |= dict(img_size=change.get("img_size", 64), cfg_options=SMALL.get(recipe, {}) | change.get("more", {}))
    with pytest.raises(ConfigError, match=match):
        distill(recipe, **given)
    assert not (tmp_path / "run").exists()
