"""tools/bench_distill.py: the re-created published step computes our loss, and everything is measured in turns."""

import json

import pytest
import torch

from tinymim.benchmarks import contenders, distill_step, distill_tables, turns
from tinymim.benchmarks.published_step import PublishedPhotos, PublishedStep
from tinymim.distill.int8_frozen import can_int8
from tinymim.errors import ConfigError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return distill_step.draw_photos(tmp_path_factory.mktemp("photos"), "64x48", 4)


def setup_of(photos, **changes):
    usual = dict(student="T", teacher="S", size=32, batch=2, precision="fp32", device="cpu", photos=str(photos))
    return contenders.Setup(**(usual | dict(drop_path=0.0) | changes))


def built(setup, folder):
    """The job as ``run`` has it before its loop, and the published models with the same weights."""
    job = contenders.MeasuredJob(setup, folder / "run")
    job.plan()
    job.build()
    models = contenders.published_models(setup)
    for model, own in zip(models, (job.model.method.student, job.model.method.teacher), strict=True):
        state = own.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    return job, models


@pytest.mark.parametrize("whole", [False, True])
def test_both_steps_have_the_same_loss_and_gradients(photos, tmp_path, whole):
    job, (student, teacher) = built(setup_of(photos, whole_teacher=whole), tmp_path)
    seen = []
    job.model.method.register_forward_pre_hook(lambda _, views: seen.extend(views))
    ours = job.model(**job.model.example(job.config, 2, "cpu"))
    ours["loss"].backward()
    theirs = PublishedStep(student.train(), teacher, lr=1e-3, device="cpu").losses(*seen)
    torch.testing.assert_close(torch.stack(theirs), torch.stack([ours["qk"], ours["vv"]]), rtol=1e-5, atol=0)
    sum(theirs).backward()
    own = dict(job.model.method.student.named_parameters())
    compared = 0
    for name, p in student.named_parameters():
        if own[name].grad is not None:
            torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-3, atol=1e-6, msg=name)
            compared += 1
    assert compared > 100
    assert float(ours["loss"].detach()) > 0


def test_a_published_step_learns_and_its_views_share_a_crop(photos):
    setup = setup_of(photos, drop_path=0.1)
    torch.manual_seed(0)
    student, teacher = contenders.published_models(setup)
    step = PublishedStep(student.train(), teacher, lr=1e-3, device="cpu")
    (views, waited), again = (next(contenders.published_batches(setup)) for _ in range(2))
    assert [tuple(view.shape) for view in views] == [(2, 3, 32, 32)] * 2
    assert waited == 0
    assert again is not None
    losses = [step(*views) for _ in range(8)]
    assert losses[-1] < losses[0]
    crop, plain = PublishedPhotos(sorted(photos.iterdir()), 32)[0]
    assert torch.corrcoef(torch.stack([crop.flatten(), plain.flatten()]))[0, 1] > 0.8


def test_needed_products_are_counted(photos):
    """ViT-B up to block 12's q, k, v: 16.5 GMAC at 224 pixels; ViT-T forward and backward 3.56 (facts of the paper)."""
    gmac = contenders.matrix_flop(setup_of(photos, teacher="B", size=224)) / 2e9
    assert gmac == pytest.approx(16.5 + 3.56, rel=0.02)
    assert contenders.matrix_flop(setup_of(photos, teacher="B", size=224, whole_teacher=True)) / 2e9 == gmac


def test_a_large_teacher_is_read_at_its_published_block(photos):
    with torch.device("meta"):
        student, teacher = contenders.published_models(setup_of(photos, teacher="L"))
        relations = student(torch.empty(1, 3, 32, 32)), teacher(torch.empty(1, 3, 32, 32))
    assert [tuple(r.shape) for side in relations for r in side] == [(1, 16, 5, 5)] * 4
    assert (teacher.block, len(teacher.blocks)) == (18, 24)
    assert contenders.MeasuredJob(setup_of(photos, teacher="L"), photos).settings.cfg_options["target_block"] == 18


@pytest.mark.slow
def test_the_check_writes_a_row_of_all_contenders(tmp_path, capsys):
    out = tmp_path / "result"
    assert distill_step.main(["--check", "--device", "cpu", "--precision", "fp32", "--out", str(out)]) == 0
    (row,) = distill_tables.read_results(out.with_suffix(".json"))["rows"]
    assert [step["name"] for step in row["steps"]] == [
        "published",
        "ours fp32",
        *(["ours fp32, int8 teacher"] if can_int8() else []),
    ]
    assert all(len(step["seconds"]) == 2 and 0 < step["utilisation"] < 1.5 for step in row["steps"])
    assert "next: python tools/bench_distill.py" in capsys.readouterr().out


@pytest.mark.slow
def test_photos_losses_and_every_precision(tmp_path, capsys):
    """All contenders in turns, photos read, losses alone; rows are added and replaced."""
    options = ["--check", "--device", "cpu", "--out", str(tmp_path / "result"), "--photos", "64x48"]
    assert distill_step.main([*options, "--workers", "1", "--loss", "--profile"]) == 0
    results = json.loads((tmp_path / "result.json").read_text())
    named = [(row["what"], row["photos"]) for row in results["rows"]]
    assert named == [("step", "64x48"), ("step", None), ("loss", None), ("profile", None)]
    for row in results["rows"]:
        assert row["environment"]["versions"]["torch"]
        assert row["threads"] >= 1
        if row["what"] == "profile":
            for step in row["steps"]:
                assert all(
                    step["kinds"][kind] > 0 for kind in ("matrix products", "attention", "loss", "norm", "optimizer")
                )
            continue
        first, *others = row["steps"]
        assert first["name"] == ("published" if row["what"] == "step" else "plain fp32")
        assert not [step["failed"] for step in row["steps"] if step["failed"]]
        assert all(len(step["times_as_fast"]) == 3 for step in others)
        if row["what"] == "step":
            assert all(0 < step["utilisation"] < 1.5 and step["peak_mib"] > 100 for step in row["steps"])
    text = (tmp_path / "result.md").read_text()
    assert text == distill_tables.table(results)
    capsys.readouterr()
    assert distill_step.main(["--check", "--device", "cpu", "--out", str(tmp_path / "result")]) == 0  # replaced
    assert len(distill_tables.read_results(tmp_path / "result.json")["rows"]) == 4


@pytest.mark.slow
def test_what_fails_is_a_row_and_not_the_end(photos, tmp_path):
    wrong = turns.Contender("ours fp32", contenders.ours, setup_of(tmp_path / "nothing"))
    assert "nothing" in wrong.failed
    full = turns.Contender("products", contenders.products, setup_of(photos), memory=0.01)
    assert full.failed == "does not fit in memory"
    for each in (wrong, full):
        each.close()
    turns.measure([wrong], rounds=1, seconds=0, warm=0)
    step = distill_step.figures(wrong, "fp32", 2, wrong)
    assert step["failed"] == wrong.failed
    row = dict(pair="T<-S", size=32, batch=2, photos=None, whole_teacher=False, steps=[step])
    assert distill_tables.lines_of(row)[0][6] == wrong.failed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100"], "patches of 16 pixels"),
        (["--photos", "big"], "width x height"),
        (["--photos", "64x48", "--workers", "0"], "read in advance"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    assert distill_step.main([*options, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "tinymim.bench"}')
    with pytest.raises(ConfigError, match="no result of this benchmark"):
        distill_tables.read_results(tmp_path / "a.json")
