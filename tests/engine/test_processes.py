"""One, two and four processes (gloo): the same losses at the same global batch, exact resume, ends without a hang."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import timm.layers
import torch

from tests.attack.kills import logged, write_data
from tests.engine.processes import launch
from tinymim.cli import main
from tinymim.engine import distill, finetune, pretrain
from tinymim.engine.loop import StepLoop
from tinymim.engine.scaling import Machine, scaling_table, step_cost
from tinymim.errors import ConfigError
from tinymim.models import create_model
from tinymim.models.draws import DropPath, draw_rows, rows_of

SMALL = {"student_args": dict(depth=3, embed_dim=24, num_heads=2), "drop_path": 0.3, "precision": "fp32"}
DECODER = {"decoder": dict(dim=16, depth=1, heads=2)}
COMMON = dict(img_size=32, batch_size=8, epochs=9, max_steps=4, save_every=2, workers=0, device="cpu")
JOBS = {
    "distill": (distill, {}),
    "masked": (distill, {**DECODER, "mask": "student", "mask_ratio": 0.5, "reconstruct": 0.5}),
    "pretrain": (pretrain, DECODER),
    "finetune": (finetune, {"mixup": 0, "cutmix": 0, "ema": 0.9}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    for label, name in enumerate(sorted(p.name for p in (folder / "photos/val").iterdir())):  # one more than processes
        for photo in list((folder / "photos/val" / name).iterdir()):
            for i in range(2 - label % 2):
                shutil.copy(photo, photo.with_stem(f"{photo.stem}_{i}"))
    return folder / "photos"


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    size = {"student_args": dict(depth=3, embed_dim=48, num_heads=4)}
    out = tmp_path_factory.mktemp("teacher") / "run"
    return str(pretrain("mae_tiny", **COMMON, data=data / "train", out=out, cfg_options=size | DECODER).student)


@pytest.fixture(scope="module")
def do(data, teacher):
    """``do(job, out, **more)``: a small run."""

    def run(name, out, **more):
        job, options = JOBS[name]
        more = dict(COMMON, data=data / "train", val_data=data / "val", out=out) | more
        more["cfg_options"] = SMALL | options | more.get("cfg_options", {})
        return job(**more, **({"teacher": teacher} if job is distill else {}))

    return run


def several(count, run, folder):
    """``run`` on several processes, all of which must end well."""
    for rank, ended in enumerate(launch(count, run, folder)):
        assert ended.code == 0, f"process {rank}: {ended.text[-3000:]}"


def records(out):
    """Losses and validations of a run, one after the other."""
    return [
        value
        for line in logged(Path(out) / "metrics.jsonl")
        if {"loss", "val_loss"} & line.keys()
        for _, value in sorted(line.items())
    ]


def saved(out):
    """What the newest checkpoint holds."""
    return torch.load(max((out / "checkpoints").iterdir()), weights_only=True)


def same(one, other):
    """Whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(map(same, one, other)) if isinstance(one, list | tuple) else one == other


SLOW = pytest.mark.slow
CASES = [
    ("masked", 2, "fsdp"),
    *(
        pytest.param(job, count, strategy, marks=SLOW)
        for job in JOBS
        for count, strategy in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
    ),
]


@pytest.mark.parametrize(("job", "count", "strategy"), CASES)
def test_losses_are_those_of_one_process(do, tmp_path, job, count, strategy):
    """With drop path, masks and a running average, in two passes a step: 1e-5 relative over the steps."""
    one = do(job, tmp_path / "one")
    parts = {"micro_batch": max(4 // count, 1)}
    several(count, lambda _: do(job, tmp_path / "n", strategy=strategy, cfg_options=parts) and 0, tmp_path / "said")
    assert records(tmp_path / "n") == pytest.approx(records(one.out), rel=1e-5, abs=1e-6)
    assert saved(tmp_path / "n")["model"].keys() == saved(one.out)["model"].keys()
    if job == "finetune":
        assert json.loads((tmp_path / "n/result.json").read_text())["photos"] == one.photos


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_blocks_computed_again_change_nothing(do, tmp_path, strategy):
    """Bit for bit; and passes of a size that both processes found by timing are those of that size."""
    for name, more in (("stored", {}), ("again", dict(grad_checkpointing=True))):
        parts = dict(strategy=strategy, micro_batch=2, **more)
        several(2, lambda _, name=name, parts=parts: do("masked", tmp_path / name, **parts) and 0, tmp_path / name[0])
    assert records(tmp_path / "again") == records(tmp_path / "stored")
    assert same(saved(tmp_path / "again")["model"], saved(tmp_path / "stored")["model"])
    several(2, lambda _: do("masked", tmp_path / "auto", strategy=strategy, micro_batch="auto") and 0, tmp_path / "b")
    assert json.loads((tmp_path / "auto/env.json").read_text())["inputs"]["micro_batch"] in (2, 4)
    assert records(tmp_path / "auto") == pytest.approx(records(tmp_path / "stored"), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_resume_is_exact(do, tmp_path, strategy):
    """Stopped after half of the steps by a signal to one process only; then on with as many, and with others."""
    step = StepLoop.run_iter

    def interrupted(rank):
        def run_iter(self, batch):
            step(self, batch)
            if rank == 1 and self.iter == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        StepLoop.run_iter = run_iter
        try:
            do("masked", tmp_path / "cut", strategy=strategy)
        except KeyboardInterrupt:
            return 0
        return 1

    several(2, lambda _: do("masked", tmp_path / "whole", strategy=strategy) and 0, tmp_path / "a")
    several(2, interrupted, tmp_path / "b")
    assert saved(tmp_path / "cut")["step"] == 2
    shutil.copytree(tmp_path / "cut", tmp_path / "one")
    several(2, lambda _: do("masked", tmp_path / "cut", strategy=strategy, resume=True) and 0, tmp_path / "c")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert all(same(saved(tmp_path / "cut")[key], saved(tmp_path / "whole")[key]) for key in ("model", "optimizer"))
    do("masked", tmp_path / "one", resume=True)  # one process goes on with what two have begun
    assert records(tmp_path / "one") == pytest.approx(records(tmp_path / "whole"), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_passes_send_nothing(do, tmp_path, strategy):
    """Every step sends the gradients once, and under fsdp gathers the weights once, in however many passes."""

    def run(rank):
        sent = {}
        for passes in (1, 4):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StepLoop, "run_iter", counting(StepLoop.run_iter, sent.setdefault(passes, [])))
                out, parts = tmp_path / f"{passes}", {"micro_batch": 4 // passes, "watch_every": 0}
                do("distill", out, strategy=strategy, cfg_options=parts, max_steps=3, save_every=3, val_data=None)
        (tmp_path / f"{rank}.json").write_text(json.dumps(sent))

    several(2, run, tmp_path / "said")
    one, four = json.loads((tmp_path / "0.json").read_text()).values()
    assert one[2] == four[2]
    assert set(one[2]) == ({"allreduce"} if strategy == "ddp" else {"allgather_base", "reduce_scatter_base"})
    assert json.loads((tmp_path / "1.json").read_text())["4"][2] == four[2]


def counting(step, found):
    """A step that appends how often it asked for each operation between processes, hooks left out."""

    def run_iter(self, batch):
        call, counts = self.runner.model.train_step, Counter()

        def profiled(*args, **words):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                out = call(*args, **words)
            asked = [event.name.removeprefix("c10d::") for event in seen.events() if event.name.startswith("c10d::")]
            counts.update(name.strip("_") for name in asked)
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.runner.model, "train_step", profiled, raising=False)
            step(self, batch)
        found.append(dict(counts))

    return run_iter


@pytest.mark.parametrize("when", ["in a step", pytest.param("before the first", marks=SLOW)])
def test_an_error_of_one_process_ends_all(data, teacher, tmp_path, monkeypatch, when):
    """Its message stands, the others say one line, nobody waits."""
    from tinymim.distill import TinyMIM

    losses = TinyMIM.losses

    def poisoned(self, *views):
        return {name: value * float("nan") for name, value in losses(self, *views).items()}

    words = ["distill", "--teacher", teacher, "--img-size", "32", "--batch-size", "8", "--max-steps", "4"]
    words += ["--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run"), "--cfg-options", "micro_batch=4"]
    words += [f"student_args.{key}={value}" for key, value in SMALL["student_args"].items()]

    def run(rank):
        folder = data / "train"
        if rank == 1 and when == "in a step":
            monkeypatch.setattr(TinyMIM, "losses", poisoned)
        elif rank == 1:
            folder = tmp_path / "not on this machine"
        return main([*words, "--data", str(folder)])

    first, second = launch(2, run, tmp_path / "said", seconds=60)
    assert second.code == (1 if when == "in a step" else 2)
    assert ("the loss is nan" if when == "in a step" else "no folder") in second.text
    assert first.code == 1
    assert "process 0 stops: another process of this job has ended" in first.text
    assert "Traceback" not in first.text + second.text


def test_random_numbers_follow_the_place_in_the_batch():
    def draws(rows):
        torch.manual_seed(3)
        masks = draw_rows(lambda n: torch.rand(n, 2), rows)
        return drop(torch.ones(rows, 4)), masks, drop(torch.ones(2 * rows, 2))  # the last: two windows of each image

    drop = DropPath(0.5).train()
    whole = draws(6)
    torch.manual_seed(3)
    torch.rand(6, 2)
    assert torch.equal(timm.layers.DropPath(0.5).train()(torch.ones(6, 4)), whole[0])  # as timm's own
    for first, count in ((0, 2), (2, 3), (5, 1)):
        with rows_of(first, count, 6):
            parts = draws(count)
        for part, all_of_it in zip(parts, whole, strict=True):
            each = len(all_of_it) // 6
            assert torch.equal(part, all_of_it[first * each : (first + count) * each])
    model = create_model("tiny_vit_5m_224", img_size=64, drop_path_rate=0.2)
    kinds = {type(m) for m in model.modules() if isinstance(m, timm.layers.DropPath)}
    assert kinds == {DropPath}


def test_runs_that_began_before_keep_their_random_numbers(do, tmp_path):
    """Of a checkpoint without ``by_rows``: drawn pass by pass, and so on resume."""

    def old(self, *args, by_rows, **words):
        made(self, *args, by_rows=False, **words)

    made, parts = StepLoop.__init__, {"micro_batch": 2, "watch_every": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoop, "__init__", old)
        whole = do("distill", tmp_path / "whole", cfg_options=parts, val_data=None).out
    newest, before = reversed(sorted((whole / "checkpoints").iterdir()))
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut/checkpoints" / newest.name).unlink()
    state = torch.load(before, weights_only=True)
    assert state.pop("by_rows")
    torch.save(state, tmp_path / "cut/checkpoints" / before.name)
    do("distill", tmp_path / "cut", cfg_options=parts, val_data=None, resume=True)
    assert records(tmp_path / "cut") == records(whole)
    assert records(do("distill", tmp_path / "new", cfg_options=parts, val_data=None).out) != records(whole)


def test_fsdp_needs_company(do, tmp_path):
    with pytest.raises(ConfigError, match="strategy=fsdp on one process"):
        do("distill", tmp_path / "run", strategy="fsdp")
    assert not (tmp_path / "run").exists()


def test_the_cost_of_a_step_on_paper():
    """Against numbers worked out by hand."""
    machine = Machine("toy", 100e12, inside=100e9, between=10e9, gpus=4, latency=(0.0, 0.0), used=0.5, link_used=1.0)
    given = dict(flop=10e9, backward=5e9, parameters=25_000_000, batch=1024)
    one, four, eight = (step_cost(machine, n, **given) for n in (1, 4, 8))
    assert (one.compute, one.seen, one.sent) == (pytest.approx(0.2048), 0, 0)
    assert (four.compute, four.sent) == (pytest.approx(0.0512), 150e6)
    assert four.links == pytest.approx(1.5e-3)
    assert four.seen == pytest.approx(1.5e-3 / 6)  # all but the last of six beside the backward pass
    assert eight.links == pytest.approx(175e6 / 10e9)
    assert eight.seen == pytest.approx(max(17.5e-3 - 12.8e-3, 17.5e-3 / 6))
    sharded = step_cost(machine, 8, **given, strategy="fsdp")
    assert sharded.seen == pytest.approx(2 * max(8.75e-3 - 12.8e-3, 8.75e-3 / 6))
    table = scaling_table(10e9, 5e9, 25_000_000, batch=1024, steps=1000, machines=[machine])
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["1", "8", "16", "32", "64"]
    assert "0.1 h" in table.splitlines()[2]
