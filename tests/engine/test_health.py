"""Watching a run: nothing of training changes, what is written, resume, TensorBoard, pictures, the warning."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attack.forked import fork
from tests.attack.kills import logged
from tinymim.cli import main
from tinymim.distill import Method
from tinymim.engine import distill, pretrain
from tinymim.engine.health import read_probe
from tinymim.errors import ConfigError, DataError
from tinymim.models import ViT, model_from_checkpoint, save_student
from tinymim_export.cli import main as export
from tinymim_export.report.page import read_metrics, run_report

SMALL = {"student_args": dict(depth=2, embed_dim=24, num_heads=2), "watch_every": 4}
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Photos of three colours with grain, 8 a class for training, 4 for validation."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 40, (40, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_student(ViT(img_size=32, embed_dim=48, depth=3, num_heads=4), path, {"name": "tinymim_vit_tiny"})
    return path


def options(classes, teacher, **more):
    chosen = SMALL | more.pop("cfg", {})
    return (
        dict(
            data=classes / "train",
            teacher=str(teacher),
            img_size=32,
            batch_size=8,
            max_steps=10,
            epochs=9,
            workers=0,
            device="cpu",
            lr=1e-3,
            cfg_options=chosen,
        )
        | more
    )


def records(out, watched=True):
    return [line for line in logged(out / "metrics.jsonl") if ("outlier/limit" in line) == watched]


def test_training_is_bit_identical_with_and_without(classes, teacher, tmp_path):
    watched = distill(**options(classes, teacher, out=tmp_path / "a", probe_data=classes, cfg={"drop_path": 0.5}))
    alone = distill(**options(classes, teacher, out=tmp_path / "b", cfg={"watch_every": 0, "drop_path": 0.5}))
    assert records(watched.out, watched=False) == records(alone.out, watched=False)
    assert len(records(watched.out)) == 4
    assert records(alone.out) == []
    a, b = (torch.load(result.student, weights_only=True)["model"] for result in (watched, alone))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_written(classes, teacher, tmp_path):
    """At the start, every four steps and at the end; the KL of the heads is the held-out loss of the same photos."""
    result = distill(
        **options(
            classes,
            teacher,
            out=tmp_path / "run",
            val_data=classes / "val",
            probe_data=classes,
            cfg={"val_every": 4, "precision": "fp32"},
        )
    )
    found = records(result.out)
    assert [record["step"] for record in found] == [0, 4, 8, 10]
    assert all(math.isfinite(value) for record in found for value in record.values())
    held_out = [record for record in records(result.out, watched=False) if "val_loss" in record]
    for record, val in zip(found, held_out, strict=True):
        for name in ("qk", "vv"):
            heads = [value for key, value in record.items() if key.startswith(f"kl_{name}/head_")]
            assert len(heads) == 4
            assert np.mean(heads) == pytest.approx(val[f"val_{name}"], rel=1e-4)
        assert {key for key in record if key.startswith("entropy")} == {
            f"entropy/block_{b:02d}/head_{h:02d}" for b in (1, 2) for h in (1, 2)
        }
        assert all(0 <= value <= 1.00001 for key, value in record.items() if key.startswith("entropy"))
        outliers = {key.partition("block_")[2] for key in record if key.startswith("outlier/block_")}
        assert outliers == {
            *(f"01/{name}" for name in ("qkv", "proj", "fc1", "fc2", "stream")),
            "02/qkv",
        }  # the trained
    assert found[-1]["knn_top1"] == found[-1]["linear_top1"] == 1.0  # the colours tell the classes


def test_pretrain_is_watched_without_relations(classes, tmp_path, capsys):
    """The command itself, --probe-data on one folder of classes."""
    argv = [
        "pretrain",
        "--data",
        str(classes / "train"),
        "--probe-data",
        str(classes / "train"),
        "--img-size",
        "32",
        "--batch-size",
        "8",
        "--max-steps",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r"),
        "--cfg-options",
        "student_args.depth=2",
        "student_args.embed_dim=24",
        "student_args.num_heads=2",
        "decoder.dim=16",
        "decoder.depth=1",
        "decoder.heads=2",
    ]
    assert main(argv) == 0
    found = records(tmp_path / "r")
    assert [record["step"] for record in found] == [0, 2]
    assert not [key for key in found[0] if key.startswith("kl_")]
    assert 0 <= found[0]["knn_top1"] <= 1
    assert "outliers announce" not in capsys.readouterr().out
    page = (tmp_path / "r/report.html").read_text()
    assert "Training health" in page
    assert "Top-1 of frozen features" in page
    assert page.count("<figcaption>Attention entropy, block by head") == 2
    assert "<figcaption>entropy/" not in page


def scalars(folder):
    """Name -> [(step, value)] as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_killed_run_goes_on_without_doubles(classes, teacher, tmp_path, monkeypatch):
    """metrics.jsonl is that of an uninterrupted run, and TensorBoard shows just that."""
    from tinymim.engine.loop import StepLoop

    chosen = dict(save_every=4, probe_data=classes, cfg={"tensorboard": True})
    whole = distill(**options(classes, teacher, out=tmp_path / "whole", **chosen))
    original = StepLoop.run_iter

    def killed(self, batch):
        original(self, batch)
        if self.iter == 7:
            raise RuntimeError("killed")

    monkeypatch.setattr(StepLoop, "run_iter", killed)
    with pytest.raises(RuntimeError, match="killed"):
        distill(**options(classes, teacher, out=tmp_path / "cut", **chosen))
    assert records(tmp_path / "cut", watched=False)[-1]["step"] == 7
    monkeypatch.setattr(StepLoop, "run_iter", original)
    distill(**options(classes, teacher, out=tmp_path / "cut", resume=True, **chosen))
    assert logged(tmp_path / "cut/metrics.jsonl") == logged(whole.out / "metrics.jsonl")
    for out in (whole.out, tmp_path / "cut"):
        expected, shown = read_metrics(out / "metrics.jsonl"), scalars(out / "tensorboard")
        assert set(shown) == set(expected)
        for name, points in expected.items():
            np.testing.assert_allclose(shown[name], points, rtol=1e-6)


def test_tensorboard_asked_for_at_resume_shows_all(classes, teacher, tmp_path):
    distill(**options(classes, teacher, out=tmp_path / "run", max_steps=6, save_every=4))
    (tmp_path / "run/checkpoints/step_00000006.pth").unlink()
    distill(
        **options(
            classes, teacher, out=tmp_path / "run", max_steps=6, resume=True, save_every=4, cfg={"tensorboard": True}
        )
    )
    assert [step for step, _ in scalars(tmp_path / "run/tensorboard")["loss"]] == [1, 2, 3, 4, 5, 6]


def test_without_tensorboard_there_is_one_note_and_only_if_asked(classes, teacher, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    for asked in (False, True):
        out = tmp_path / str(asked)
        distill(**options(classes, teacher, out=out, max_steps=1, cfg={"tensorboard": asked}))
        assert capsys.readouterr().out.count("pip install 'tinymim[tensorboard]'") == int(asked)
        assert not (out / "tensorboard").exists()


def test_outliers_are_announced_once_with_what_to_type(classes, teacher, tmp_path, capsys):
    """A student with a loud channel in front of fc1; the report says the same and draws it."""
    torch.manual_seed(0)
    loud = ViT(img_size=32, **SMALL["student_args"])
    with torch.no_grad():
        loud.blocks[0].norm2.bias[7] = 300
        loud.blocks[0].mlp.fc1.weight[:, 7] = 0
    save_student(loud, tmp_path / "loud.pth", {"name": "tinymim_vit_tiny"})
    out = tmp_path / "run"
    distill(**options(classes, teacher, out=out, init_from=str(tmp_path / "loud.pth"), max_steps=2))
    printed = capsys.readouterr().out
    assert printed.count("outliers will hurt INT8") == 1
    assert "in block 1 the largest input of fc1 (channel 7)" in printed
    commands = [line.split() for line in printed.splitlines() if line.strip().startswith("tinymim-export")]
    assert len(commands) == 2
    for words in commands:  # understood as they are; only the segmentor is not there
        assert export(words[1:]) == 2
        assert "segmentor.pth" in capsys.readouterr().err
    page = run_report(out).read_text()
    assert all(" ".join(words) in page for words in commands)
    assert "the largest input of fc1 in block 1 (channel 7)" in page
    assert "1 of 5 inputs exceed 20" in page  # of the last block only what enters qkv is trained
    assert page.count("var(--bad) 70%") == 1


def test_probe_folders(classes, tmp_path):
    both, one = read_probe(classes, 100), read_probe(classes / "train", 100)
    assert (len(both.train), len(both.val), len(one.train), len(one.val)) == (24, 12, 19, 5)
    assert {path.parent.parent.name for path, _ in both.val} == {"val"}
    assert not {path for path, _ in one.train} & {path for path, _ in one.val}
    few = read_probe(classes / "train", 3)
    assert (len(few.train), len(few.val)) == (3, 3)
    assert len({label for _, label in few.train}) == 2  # at least two, though five photos a class are wanted
    assert few == read_probe(classes / "train", 3)
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    with pytest.raises(DataError, match="unknown class: c"):
        read_probe(tmp_path, 100)
    for empty in (tmp_path / "train" / "a", tmp_path / "nowhere"):
        with pytest.raises(DataError):
            read_probe(empty, 100)


def test_the_probe_of_many_classes(tmp_path):
    """Few photos of a thousand classes would say nothing: some classes, the same for both, each with several photos."""
    for part in ("train", "val"):
        for i in range(60):
            (tmp_path / part / f"{i:02d}").mkdir(parents=True)
            for k in range(12):
                (tmp_path / part / f"{i:02d}" / f"{k}.png").touch()
    for probe in (read_probe(tmp_path, 50), read_probe(tmp_path / "train", 50)):
        assert len(probe.train) == 50
        classes = {label for _, label in probe.train}
        assert len(classes) == 10
        assert max(classes) >= 50
        counts = [sum(label == c for _, label in probe.train) for c in classes]
        assert min(counts) >= 2
        assert {label for _, label in probe.val} <= classes
    assert len({label for _, label in read_probe(tmp_path, 300).train}) == 60


def test_a_damaged_photo_is_left_out_of_the_probe(classes, tmp_path):
    """Its place is not taken by a neighbour under a wrong label."""
    from tinymim.engine.health import HealthHook
    from tinymim.engine.model import PretrainModel

    probe = read_probe(classes, 100)
    broken = tmp_path / "broken.png"
    broken.write_bytes(probe.train[0][0].read_bytes()[:60])
    encoder = ViT(img_size=32, **SMALL["student_args"]).eval()
    holder = Method()
    holder.student = encoder
    hook = HealthHook(tmp_path, [], 32, 1, probe, "whole")
    pairs = [(broken, 2), *probe.train[:4]]
    features, labels = hook._embed(pairs, PretrainModel(holder), torch.device("cpu"))
    assert labels.tolist() == [label for _, label in probe.train[:4]]
    assert features.shape == (4, 24)


def test_labels_for_a_run_that_is_not_watched_are_refused(classes, teacher, tmp_path):
    with pytest.raises(ConfigError, match="a run without health metrics"):
        distill(**options(classes, teacher, out=tmp_path / "r", probe_data=classes, cfg={"watch_every": 0}))


@pytest.mark.slow
def test_probes_on_real_photos(shared, tmp_path):
    """Imagenette: pre-training a small MAE beats chance, and the linear probe rises from its start."""
    data = shared / "data/imagenette224"
    result = pretrain(
        "mae_tiny",
        data=data / "train",
        probe_data=data,
        out=tmp_path / "r",
        img_size=64,
        batch_size=64,
        max_steps=60,
        epochs=9,
        lr=1.5e-3,
        workers=0,
        device="cpu",
        cfg_options={
            "student_args": dict(depth=4, embed_dim=64, num_heads=4),
            "watch_every": 60,
            "decoder": dict(dim=48, depth=1, heads=4),
        },
    )
    start, end = records(result.out)
    assert end["knn_top1"] > 0.15
    assert end["linear_top1"] > max(0.2, start["linear_top1"] - 0.02)
    assert model_from_checkpoint(result.student)[0].depth == 4


@pytest.mark.slow
def test_a_run_at_1024_pixels_holds_no_relation(shared, teacher, tmp_path):
    """Real photos, watched: 4,097 tokens, of which the plain form stores 4 x 4 x 4,097^2 values, several times."""
    photos = shared / "data/camvid/images/training/0001TP_006{690,720,750,780}.jpg"

    def kib(name):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    def run():
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
        before = kib("VmRSS")
        small = SMALL | {"micro_batch": 1}
        more = dict(img_size=1024, batch_size=2, max_steps=2, workers=0, device="cpu", out=tmp_path / "run")
        distill(data=photos, teacher=str(teacher), cfg_options=small, **more)
        print(f"rise {kib('VmHWM') - before} KiB")
        return 0

    assert fork(run, tmp_path / "said.txt") == 0
    rise = int((tmp_path / "said.txt").read_text("utf-8").split("rise ")[1].split()[0]) * 1024
    assert rise < 4 * 4 * 4097**2 * 4
    assert any("kl_qk/head_01" in line for line in logged(tmp_path / "run/metrics.jsonl"))


def test_tensorboard_by_recipe_and_by_option_is_logged_once(classes, teacher, tmp_path):
    chosen = dict(max_steps=3, cfg={"tensorboard": True})
    run = distill(**options(classes, teacher, out=tmp_path / "run", **chosen), log=["tensorboard"])
    assert [step for step, _ in scalars(run.out / "tensorboard")["loss"]] == [1, 2, 3]
