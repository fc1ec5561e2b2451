"""Resuming a segmentation run: what may change and is said, what is refused, longer runs, lower rates, lost files."""

import json
import shutil

import pytest
import torch

from tinymim.errors import CheckFailed, CheckpointError, ConfigError, TinyMIMError
from tinymim.models import save_student
from tinymim.models.vit import ViT
from tinymim.seg import TinyMIMBackbone, train_segmentor
from tinymim.seg.config import find_config
from tinymim.seg.hooks import RunFolderHook

DEMO = "upernet_tinymim_demo"
LR = "optim_wrapper.optimizer.lr"
STEPS = "train_cfg.max_iters"


@pytest.fixture(scope="module")
def go(scenes, small):
    """Train the small config with more options; ``more`` are keywords of train_segmentor."""

    def train(folder, options=(), **more):
        return train_segmentor(
            DEMO, work_dir=folder, **{"data_root": scenes, **more}, cfg_options=small(**{STEPS: 4, **dict(options)})
        )

    return train


@pytest.fixture(scope="module")
def finished(go, tmp_path_factory):
    """A finished run of 4 steps, with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    go(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def rates(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train_dataloader.batch_size", 4, "train_dataloader.batch_size: 2 -> 4"),
        ("train_dataloader.dataset.pipeline.3.crop_size", (32, 32), r"pipeline.3.crop_size: \[64, 64\] -> \[32, 32\]"),
        ("randomness.seed", 7, "randomness.seed: 0 -> 7"),
        ("param_scheduler.1.power", 0.9, "param_scheduler.1.power: 1.0 -> 0.9"),
        ("optim_wrapper.optimizer.weight_decay", 0.5, "weight_decay: 0.05 -> 0.5"),
        ("optim_wrapper.optimizer.type", "Adam", "optimizer.type: 'AdamW' -> 'Adam'"),
        ("optim_wrapper.paramwise_cfg.layer_decay", 0.5, "layer_decay: 0.8 -> 0.5"),
        ("model.decode_head.loss_decode.loss_weight", 2.0, "loss_weight: 1.0 -> 2.0"),
        ("train_dataloader.sampler.shuffle", False, "sampler.shuffle: True -> False"),
    ],
)
def test_what_decides_the_numbers_is_refused_with_both_values(go, run, key, value, said):
    before = (run / "config.py").read_bytes()
    with pytest.raises(ConfigError, match=said) as caught:
        go(run, {key: value}, resume=True)
    assert "repeat the first command" in caught.value.fix
    assert (run / "config.py").read_bytes() == before


@pytest.mark.slow
def test_other_data_classes_student_and_processes_are_refused(go, run, scenes, tmp_path):
    other = shutil.copytree(scenes, tmp_path / "other")
    moved = go(run, resume=True, data_root=other)  # the same files elsewhere
    assert moved.images == 5
    save_student(ViT(img_size=32, embed_dim=24, depth=4, num_heads=2), tmp_path / "student.pth", {})
    with pytest.raises(ConfigError, match="started without a student"):
        go(run, resume=True, student=tmp_path / "student.pth")
    about = json.loads((other / "dataset.json").read_text())
    about["classes"][:2] = about["classes"][1::-1]
    (other / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="other classes"):
        go(run, resume=True, data_root=other)
    next((other / "images" / "training").iterdir()).write_bytes(b"x")
    with pytest.raises(ConfigError, match="other training data"):
        go(run, resume=True, data_root=other)
    env = json.loads((run / "env.json").read_text())
    env["inputs"]["processes"] = 2
    (run / "env.json").write_text(json.dumps(env))
    with pytest.raises(ConfigError, match=r"started with 2 process\(es\), not 1"):
        go(run, resume=True)


@pytest.mark.slow
def test_a_longer_run_really_has_the_longer_schedule(go, run, capsys):
    """Its rates are those of a run that was to be as long from the start."""
    with pytest.raises(ConfigError, match=r"has done 4 steps, train_cfg.max_iters is 3"):
        go(run, {STEPS: 3}, resume=True)
    go(run, {STEPS: 8}, resume=True)
    assert "train_cfg.max_iters: 4 -> 8" in capsys.readouterr().out
    found = rates(run)
    whole = [1e-3 * (1 - step / 8) for step in range(8)]
    assert [found[step] for step in (5, 6, 7, 8)] == pytest.approx(whole[4:], rel=1e-6)
    (run / "checkpoints" / "iter_8.pth").unlink()
    go(run, {STEPS: 8}, resume=True)  # killed meanwhile: unchanged since, and the same rates
    assert "changed since" not in capsys.readouterr().out
    assert rates(run) == found


@pytest.mark.slow
def test_a_cosine_schedule_is_stretched_too(go, tmp_path):
    cosine = [dict(type="CosineAnnealingLR", T_max=4, by_epoch=False, begin=0, end=4)]
    longer = [dict(cosine[0], T_max=8, end=8)]
    go(tmp_path / "run", {"param_scheduler": cosine})
    go(tmp_path / "run", {"param_scheduler": longer, STEPS: 8}, resume=True)
    assert [round(rates(tmp_path / "run")[step] * 1e3, 3) for step in (5, 7)] == [0.5, 0.146]


@pytest.mark.slow
@pytest.mark.parametrize("advice", [{LR: 1e-4}, {}], ids=["a lower rate", "without --amp"])
def test_the_advice_for_a_loss_that_is_not_finite_works(go, tmp_path, monkeypatch, capsys, advice):
    forward, calls = TinyMIMBackbone.forward, []

    def spoil(self, images):
        calls.append(1)
        return tuple(level * (float("nan") if len(calls) == 3 else 1.0) for level in forward(self, images))

    with monkeypatch.context() as patch:
        patch.setattr(TinyMIMBackbone, "forward", spoil)
        with pytest.raises(CheckFailed, match="--resume and a lower rate"):
            go(tmp_path / "run", amp=not advice, device="cpu")
    go(tmp_path / "run", advice, resume=True, device="cpu")
    assert f"{LR}: 0.001 -> 0.0001" in capsys.readouterr().out or not advice
    assert [rates(tmp_path / "run")[step] for step in (3, 4)] == pytest.approx(
        [advice.get(LR, 1e-3) * (1 - step / 4) for step in (2, 3)], rel=1e-6
    )


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_a_run_of_no_steps_is_refused(go, tmp_path, steps):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        go(tmp_path / "run", {STEPS: steps})
    assert not (tmp_path / "run").exists()


def product(folder):
    """Tensors and metadata of segmentor.pth; its config names the folder."""
    content = torch.load(folder / "segmentor.pth", weights_only=True)
    return content["state_dict"], {key: value for key, value in content["meta"].items() if key != "config"}


def same(ours, theirs):
    return ours[1] == theirs[1] and all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])


def test_a_finished_run_tells_its_result_and_makes_again_what_is_missing(go, run, finished, monkeypatch):
    (run / "result.json").unlink()
    (run / "segmentor.pth").unlink()
    monkeypatch.setattr(RunFolderHook, "after_train_iter", None)  # no step is taken
    go(run, resume=True)
    assert same(product(run), product(finished))
    assert (run / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert (
        json.loads((run / "result.json").read_text())["mIoU"]
        == json.loads((finished / "result.json").read_text())["mIoU"]
    )


@pytest.mark.slow
def test_a_product_that_is_damaged_or_of_an_earlier_step_is_made_again(go, run, finished):
    older = torch.load(run / "checkpoints" / "iter_2.pth", weights_only=False)["state_dict"]
    for write in (
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"state_dict": older, "meta": product(finished)[1] | {"step": 2}}, path),
        lambda path: torch.save({"state_dict": older, "meta": product(finished)[1]}, path),
    ):
        write(run / "segmentor.pth")
        go(run, resume=True)
        assert same(product(run), product(finished))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_goes_on_from_the_older(go, run, capsys):
    before, weights = (run / "metrics.jsonl").read_text(), product(run)
    newest = run / "checkpoints" / "iter_4.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    go(run, resume=True)
    assert "resuming at step 2" in capsys.readouterr().out
    assert before == (run / "metrics.jsonl").read_text()
    assert same(product(run), weights)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        go(run, resume=True)
    shutil.copy(run / "segmentor.pth", newest)  # whole, and something else
    with pytest.raises(CheckpointError, match=r"iter_4\.pth"):
        go(run, resume=True)


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint_the_student_is_not_forgotten(go, tmp_path, monkeypatch, capsys):
    student = tmp_path / "student.pth"
    save_student(ViT(img_size=32, embed_dim=24, depth=4, num_heads=2), student, {})
    whole = go(tmp_path / "whole", {STEPS: 1}, student=student)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolderHook, "after_train_iter", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(tmp_path / "run", {STEPS: 1}, student=student)
    again = go(tmp_path / "run", {STEPS: 1}, resume=True)
    assert "as the run was started with" in capsys.readouterr().out
    ours, theirs = (torch.load(r.segmentor, weights_only=True)["state_dict"] for r in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    (tmp_path / "run" / "checkpoints" / "iter_1.pth").unlink()
    student.unlink()
    lines = (tmp_path / "run" / "config.py").read_text()
    assert str(student) in lines
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*student\.pth"):
        go(tmp_path / "run", {STEPS: 1}, resume=True)


@pytest.mark.slow
def test_what_cannot_be_built_leaves_nothing_and_replaces_nothing(go, run, tmp_path):
    save_student(ViT(img_size=32, embed_dim=48, depth=4, num_heads=2), tmp_path / "wide.pth", {})
    with pytest.raises(TinyMIMError):
        go(tmp_path / "new", student=tmp_path / "wide.pth")
    assert not (tmp_path / "new").exists()
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(TinyMIMError):
        go(run, student=tmp_path / "wide.pth", overwrite=True)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_folders_of_another_kind_are_not_resumed(go, tmp_path):
    other = tmp_path / "distilled"
    other.mkdir()
    (other / "config.py").write_text("method = 'relations'\nstudent = 'tinymim_vit_tiny'\n")
    with pytest.raises(ConfigError, match="another kind of run"):
        go(other, resume=True)
    (other / "config.py").unlink()
    (other / "photo.jpg").touch()
    with pytest.raises(ConfigError, match="holds no run to resume"):
        go(other, resume=True)
    assert [path.name for path in other.iterdir()] == ["photo.jpg"]


def test_a_config_without_a_number_of_steps_is_refused(scenes, small, tmp_path):
    from tinymim.seg import estimate_segmentor

    cfg = find_config("upernet_tinymim_demo")
    del cfg.train_cfg["max_iters"]
    options = {key: value for key, value in small().items() if key != "train_cfg.max_iters"}
    for start in (estimate_segmentor, lambda *a, **k: train_segmentor(*a, work_dir=tmp_path / "run", **k)):
        with pytest.raises(ConfigError, match="max_iters is None"):
            start(cfg, data_root=scenes, cfg_options=options)
    assert not (tmp_path / "run").exists()
