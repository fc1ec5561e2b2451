"""Runs of the engine after a kill, a damaged file, a lost product, a loss that is not finite, a removed folder."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.attack.kills import logged, write_data
from tinymim.engine import distill, distill_chain, finetune, pretrain
from tinymim.engine.loop import StepLoop
from tinymim.engine.model import NonFiniteLoss
from tinymim.errors import CheckpointError, ConfigError, TinyMIMError

SMALL = {"student_args": dict(depth=2, embed_dim=24, num_heads=2)}
COMMON = dict(img_size=32, batch_size=4, max_steps=4, save_every=2, workers=0, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder / "photos"


@pytest.fixture(scope="module")
def options(data):
    return dict(COMMON, data=data / "train", val_data=data / "val", cfg_options=SMALL)


@pytest.fixture(scope="module")
def teacher(options, tmp_path_factory):
    decoder = {"decoder": dict(dim=16, depth=1, heads=2)}
    return pretrain("mae_tiny", **options | dict(out=tmp_path_factory.mktemp("t") / "run", cfg_options=SMALL | decoder))


@pytest.fixture(scope="module")
def tuned(options, teacher, tmp_path_factory):
    return finetune(**options, student=teacher.student, out=tmp_path_factory.mktemp("f") / "run")


@pytest.fixture(scope="module")
def distilled(options, teacher, tmp_path_factory):
    return distill(**options, teacher=str(teacher.student), out=tmp_path_factory.mktemp("d") / "run").out


@pytest.fixture
def run(options, teacher, distilled, tmp_path):
    """A finished distillation, and how to do it again."""
    folder = Path(shutil.copytree(distilled, tmp_path / "run"))
    return lambda **more: distill(**options | dict(teacher=str(teacher.student), out=folder) | more), folder


def test_a_finished_run_makes_its_product_again(run, monkeypatch):
    """Missing, empty, of an earlier step, or of other weights than env.json notes: the same bytes as before."""
    go, folder = run
    whole, metrics = (folder / "student.pth").read_bytes(), logged(folder / "metrics.jsonl")
    content = torch.load(folder / "student.pth", weights_only=True)
    monkeypatch.setattr(StepLoop, "run_iter", None)  # no step is taken

    def other(**meta):
        torch.save({"model": {k: v + 1 for k, v in content["model"].items()}, "meta": content["meta"] | meta}, file)

    file = folder / "student.pth"
    for spoil in (file.unlink, lambda: file.write_bytes(b""), lambda: other(step=2), other):
        spoil()
        result = go(resume=True)
        assert file.read_bytes() == whole
        assert logged(folder / "metrics.jsonl") == metrics
    assert set(result.losses) == {"qk", "vv", "loss"}
    assert [step for step, _ in result.val] == [0, 3, 4]
    before = file.stat().st_mtime_ns
    go(resume=True)
    assert file.stat().st_mtime_ns == before  # what is right is left alone
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_a_run_from_before_decode_goes_on_as_it_began(options, teacher, distilled, tmp_path, capsys):
    """Its config.py does not have the key: the photos are decoded whole, as they were."""
    words = options | dict(teacher=str(teacher.student), out=tmp_path / "run")
    went = distill(**words | dict(cfg_options=SMALL | {"decode": "whole", "workers": 2}))
    whole, metrics = went.student.read_bytes(), logged(went.metrics)
    assert metrics != logged(distilled / "metrics.jsonl")  # other pixels
    config = (went.out / "config.py").read_text()
    (went.out / "config.py").write_text(config.replace("decode = 'whole'\n", ""))
    (went.out / "checkpoints/step_00000004.pth").unlink()
    distill(**words, resume=True)
    assert "resuming at step 2" in capsys.readouterr().out
    assert (went.student.read_bytes(), logged(went.metrics)) == (whole, metrics)
    with pytest.raises(ConfigError, match="decode: 'crop' -> 'whole'"):
        distill(
            **options
            | dict(teacher=str(teacher.student), out=distilled, resume=True, cfg_options=SMALL | {"decode": "whole"})
        )


def test_a_classifier_from_before_decode_goes_on_as_it_began(options, teacher, tuned, tmp_path):
    words = options | dict(student=teacher.student, out=tmp_path / "run")
    went = finetune(**words | dict(cfg_options=SMALL | {"decode": "whole"}))
    whole, metrics = went.classifier.read_bytes(), logged(went.metrics)
    assert metrics != logged(tuned.metrics)
    config = (went.out / "config.py").read_text()
    (went.out / "config.py").write_text(config.replace("decode = 'whole'\n", ""))
    (went.out / "checkpoints/step_00000004.pth").unlink()
    finetune(**words, resume=True)
    assert (went.classifier.read_bytes(), logged(went.metrics)) == (whole, metrics)


def test_a_finished_classifier_tells_its_scores_again(options, tuned, tmp_path):
    folder = Path(shutil.copytree(tuned.out, tmp_path / "run"))
    (folder / "result.json").unlink()
    (folder / "classifier.pth").unlink()
    again = finetune(**options, out=folder, resume=True)
    assert (again.top1, again.top5, again.photos) == (tuned.top1, tuned.top5, tuned.photos)
    assert (folder / "classifier.pth").read_bytes() == tuned.classifier.read_bytes()
    assert logged(folder / "metrics.jsonl") == logged(tuned.metrics)


@pytest.mark.slow
def test_damaged_checkpoints(run, capsys):
    go, folder = run
    whole, metrics = (folder / "student.pth").read_bytes(), logged(folder / "metrics.jsonl")
    old, new = sorted((folder / "checkpoints").iterdir())
    new.write_bytes(b"\0" * 999)
    go(resume=True)
    assert "resuming at step 2" in capsys.readouterr().out
    assert ((folder / "student.pth").read_bytes(), logged(folder / "metrics.jsonl")) == (whole, metrics)
    shutil.copy(folder / "student.pth", new)  # whole, but no checkpoint
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        go(resume=True)
    for path in (old, new):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        go(resume=True)


@pytest.mark.slow
def test_the_advice_for_a_loss_that_is_not_finite_works(run, monkeypatch, capsys):
    """A lower rate on resume is said, is used, and is the run's own from then on."""
    from tinymim.distill import TinyMIM

    go, folder = run
    losses, calls = TinyMIM.losses, []

    def poisoned(self, *views):
        calls.append(1)
        return {k: v * (float("nan") if len(calls) == 3 else 1) for k, v in losses(self, *views).items()}

    with monkeypatch.context() as patch:
        for name in ("losses", "forward"):
            patch.setattr(TinyMIM, name, poisoned)
        with pytest.raises(NonFiniteLoss, match="resume with a lower --lr"):
            go(overwrite=True, val_data=None)
    go(resume=True, val_data=None, lr=1e-5)
    assert "changed since the run began: lr: None -> 1e-05" in capsys.readouterr().out
    lines = logged(folder / "metrics.jsonl")
    assert lines[2]["lr"] < 1e-5 < lines[1]["lr"] * 10
    go(resume=True, val_data=None, lr=1e-5)
    assert "changed since" not in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint_a_classifier_asks_for_its_student(options, teacher, tmp_path, monkeypatch):
    given = dict(options, out=tmp_path / "run", val_data=None)
    whole = finetune(**given | dict(out=tmp_path / "whole"), student=teacher.student)
    with monkeypatch.context() as patch:
        patch.setattr(StepLoop, "run_iter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(**given, student=teacher.student)
    with pytest.raises(ConfigError, match=r"started with the student student\.pth[\s\S]*add --student"):
        finetune(**given, resume=True)
    again = finetune(**given, resume=True, student=teacher.student)
    assert again.classifier.read_bytes() == whole.classifier.read_bytes()


def test_a_run_folder_removed_meanwhile_is_our_error_and_stays_away(run, monkeypatch):
    go, folder = run
    step = StepLoop.run_iter

    def vanish(self, batch):
        shutil.rmtree(folder, ignore_errors=True)
        step(self, batch)

    monkeypatch.setattr(StepLoop, "run_iter", vanish)
    with pytest.raises(TinyMIMError, match=r"the run folder .* is gone"):
        go(overwrite=True)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_fails_meanwhile_leaves_a_run_that_goes_on(run, monkeypatch, call):
    """Every write from the second checkpoint on fails; the resumed run ends like an undisturbed one."""
    go, folder = run
    whole, metrics = (folder / "student.pth").read_bytes(), logged(folder / "metrics.jsonl")
    real, step = getattr(os, call), StepLoop.run_iter

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def fill(self, batch):
        if self.iter == 3:
            monkeypatch.setattr(os, call, fail)
        step(self, batch)

    monkeypatch.setattr(StepLoop, "run_iter", fill)
    with pytest.raises(TinyMIMError, match="No space left"):
        go(overwrite=True)
    monkeypatch.setattr(os, call, real)
    monkeypatch.setattr(StepLoop, "run_iter", step)
    assert not list(folder.rglob(".*"))
    go(resume=True)
    assert ((folder / "student.pth").read_bytes(), logged(folder / "metrics.jsonl")) == (whole, metrics)


def test_a_chain_whose_first_hop_cannot_be_built_leaves_nothing(options, teacher, tmp_path):
    with pytest.raises(TinyMIMError):
        distill_chain(f"{tmp_path / 'absent.pth'}:tiny", **options | dict(out=tmp_path / "chain"))
    assert not (tmp_path / "chain").exists()
    chain = f"{teacher.student}:tiny"
    whole = distill_chain(chain, **options | dict(out=tmp_path / "chain"))
    bytes_before = whole.student.read_bytes()
    whole.student.unlink()
    again = distill_chain(chain, **options | dict(out=tmp_path / "chain", resume=True))
    assert again.student.read_bytes() == bytes_before
