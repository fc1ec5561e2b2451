"""How many images a pass takes: found by time and memory, kept for a resume; and blocks that are computed again."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.attack.kills import logged, write_data
from tinymim.engine import distill, finetune, plan, pretrain
from tinymim.engine.loop import StepLoop
from tinymim.engine.model import Trainable, saved_bytes
from tinymim.errors import ConfigError
from tinymim.models import ViT

SMALL = {"student_args": dict(depth=3, embed_dim=24, num_heads=2), "drop_path": 0.3}
DECODER = {"decoder": dict(dim=16, depth=1, heads=2)}
COMMON = dict(img_size=32, batch_size=8, epochs=9, max_steps=3, save_every=2, workers=0, device="cpu")
JOBS = {
    "distill": (distill, {"watch_every": 0}),
    "masked": (distill, {**DECODER, "mask": "student", "mask_ratio": 0.5, "reconstruct": 0.5, "watch_every": 0}),
    "pretrain": (pretrain, {**DECODER, "watch_every": 0}),
    "finetune": (finetune, {"ema": 0.9}),
}


@pytest.fixture(scope="module")
def do(tmp_path_factory):
    """``do(job, out, **more)``: a small run."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    size = {"student_args": dict(depth=3, embed_dim=48, num_heads=4)} | DECODER
    data = folder / "photos/train"
    teacher = str(pretrain("mae_tiny", **COMMON, data=data, out=folder / "teacher", cfg_options=size).student)

    def run(name, out, **more):
        job, options = JOBS[name]
        more = dict(COMMON, data=data, out=out) | more
        more["cfg_options"] = SMALL | options | more.get("cfg_options", {})
        return job(**more, **({"teacher": teacher} if job is distill else {}))

    return run


def records(out):
    return [{k: v for k, v in line.items() if k != "data_wait"} for line in logged(Path(out) / "metrics.jsonl")]


def weights(out):
    return torch.load(max((Path(out) / "checkpoints").iterdir()), weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("job", JOBS)
def test_blocks_computed_again_change_nothing(do, tmp_path, job):
    """Drop path, masks, two passes a step: bit for bit the run that stores its activations."""
    for name, on in (("stored", None), ("again", True)):
        do(job, tmp_path / name, micro_batch=4, grad_checkpointing=on)
    assert records(tmp_path / "again") == records(tmp_path / "stored")
    assert equal(weights(tmp_path / "again"), weights(tmp_path / "stored"))


def test_they_take_less_memory():
    """What a pass of 12 blocks needs: 12 inputs and one block's activations, in place of 12 blocks' activations."""
    model, images = ViT(img_size=64, embed_dim=48, num_heads=2).train(), torch.randn(4, 3, 64, 64)
    needs = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        needs.append(saved_bytes(model, lambda: model(images).square().mean()))
    assert model.grad_checkpointing
    block = needs[0] / 12
    assert 1.2 * block < needs[1] < 0.25 * needs[0]


def timed(monkeypatch, seconds):
    """Passes take what ``seconds`` says of their size."""
    asked = []
    monkeypatch.setattr(plan, "_pass_seconds", lambda model, config, n, place: asked.append(n) or seconds(n))
    monkeypatch.setattr(plan, "saved_bytes_per_image", lambda *a: 1)
    return asked


@pytest.mark.parametrize(
    ("share", "seconds", "tried", "best"),
    [
        (48, lambda n: 0.01 * n + 0.1, [6, 12, 24, 48], 48),  # the fewest passes
        (48, lambda n: 0.01 * n + 0.0001 * n**2 + 0.01, [6, 12, 24, 48], 12),
        (48, lambda n: math.inf if n > 20 else 0.01 * n + 0.1, [6, 12, 24], 12),  # a GPU's memory holds no more
        (48, lambda n: 2.0 * n + 10, [6], 6),  # slow: larger ones would take too long to time
        (7, lambda n: 0.01 * n, [7], 7),
        (4096, lambda n: 0.001 * n, [16, 32, 64, 128], 16),  # equally fast: the smallest
    ],
)
def test_auto_takes_the_fastest(monkeypatch, share, seconds, tried, best):
    asked = timed(monkeypatch, seconds)
    model, config = Toy(), plan.Config(dict(micro_batch="auto"))
    found, how = plan.micro_batch(config, model, share, "cpu")
    assert (found, sorted({*asked})) == (best, tried)
    assert how.endswith(f"the run takes {best}")


class Toy(Trainable):
    def __init__(self):
        super().__init__(None)

    def forward(self, image):
        raise AssertionError("timed by a function of the test")

    def example(self, config, count, place):
        return {"image": torch.zeros(count, 1)}


def test_auto_refuses_what_never_fits(monkeypatch):
    timed(monkeypatch, lambda n: math.inf)
    with pytest.raises(ConfigError, match=r"a pass of 6 image.* does not fit"):
        plan.micro_batch(plan.Config(dict(micro_batch="auto")), Toy(), 48, "cpu")


@pytest.mark.parametrize("job", ["masked", "finetune"])
def test_auto_leaves_no_trace_and_is_kept(do, tmp_path, monkeypatch, job, capsys):
    """The run is that of the number it finds; stopped before its first checkpoint or after, it goes on with it."""
    do(job, tmp_path / "auto", micro_batch="auto", dry_run=True)
    assert "images/s by images per pass: 2: " in capsys.readouterr().out
    do(job, tmp_path / "auto", micro_batch="auto")
    found = json.loads((tmp_path / "auto/env.json").read_text())["inputs"]["micro_batch"]
    assert f"the run takes {found}" in capsys.readouterr().out
    do(job, tmp_path / "same", micro_batch=found)
    assert records(tmp_path / "auto") == records(tmp_path / "same")
    step = StepLoop.run_iter

    def fail(self, batch):
        if self._iter == at:
            raise RuntimeError("power cut")
        step(self, batch)

    for at in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(StepLoop, "run_iter", fail)
            patch.setattr(plan, "time_passes", lambda *a: {found: 1.0})
            with pytest.raises(RuntimeError, match="power cut"):
                do(job, tmp_path / f"cut{at}", micro_batch="auto")
            patch.setattr(StepLoop, "run_iter", step)
            patch.setattr(plan, "time_passes", lambda *a: {1: 1.0})
            do(job, tmp_path / f"cut{at}", micro_batch="auto", resume=True)
        assert records(tmp_path / f"cut{at}") == records(tmp_path / "auto")
        assert equal(weights(tmp_path / f"cut{at}"), weights(tmp_path / "auto"))


def test_micro_batch_is_a_number_or_auto(do, tmp_path):
    with pytest.raises(ConfigError, match="it must be 'auto', or a number of at least 1") as caught:
        do("distill", tmp_path / "run", micro_batch="most")
    assert caught.value.fix == "use --micro-batch N"
    assert not (tmp_path / "run").exists()


class Greedy(Toy):
    """Each image takes 64 MiB."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, image):
        much = torch.zeros(len(image) << 24, device=self.weight.device)
        return {"loss": (self.weight * much).sum()}

    def example(self, config, count, place):
        return {"image": torch.zeros(count, 1, device=place)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_passes_that_a_gpu_does_not_hold_are_passed_over():
    """A TiB is too much for any; what the pass had taken is given back, and the model is as it was."""
    model, before = Greedy().to("cuda"), torch.cuda.memory_allocated()
    found = plan.time_passes(plan.Config({}), model, [1, 2, 1 << 14, 1 << 15], "cuda")
    assert [*found] == [1, 2]
    assert model.weight.grad is None
    assert torch.cuda.memory_allocated() - before < 1 << 24
    assert not plan.time_passes(plan.Config({}), model, [1 << 14], "cuda")
