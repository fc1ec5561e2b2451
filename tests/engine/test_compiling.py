"""``compile``: the student's blocks compiled, kept where it pays, off where it fails; a resumed run keeps it."""

import shutil

import pytest
import torch
from mmengine.config import Config

from tests.attack.kills import write_data
from tinymim.distill import TinyMIM
from tinymim.engine import compiling, distill, pretrain
from tinymim.engine.loop import StepLoop
from tinymim.engine.model import PretrainModel
from tinymim.errors import ConfigError
from tinymim.models import ViT

SIZES = dict(img_size=32, embed_dim=24, depth=3, num_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PretrainModel(TinyMIM(ViT(**SIZES, drop_path_rate=0.1), ViT(**SIZES)))


def is_compiled(model):
    return [block._compiled_call_impl is not None for block in model.encoder.blocks]


@pytest.mark.parametrize(("after", "on"), [(0.9, True), (0.99, False), (1.2, False)])
def test_auto_keeps_what_pays(model, monkeypatch, after, on):
    times = iter([{4: 1.0}, {4: after}])
    monkeypatch.setattr(compiling, "time_passes", lambda *_: next(times))
    kept, how = compiling.compile_student(Config(dict(compile="auto")), model, 4, "cuda")
    assert kept is on
    assert is_compiled(model) == [on] * 3
    assert how == f"torch.compile is {'on' if on else 'off'}: with it a pass is {1 / after:.2f} times as fast"
    assert model.encoder.state_dict().keys() == ViT(**SIZES).state_dict().keys()


def test_where_it_fails(model, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(compiling, "time_passes", fail)
    with pytest.raises(ConfigError, match="no compiler"):
        compiling.compile_student(Config(dict(compile="on")), model, 4, "cpu")
    monkeypatch.setattr(compiling, "time_passes", lambda *_: fail() if any(is_compiled(model)) else {4: 1.0})
    kept, how = compiling.compile_student(Config(dict(compile="auto")), model, 4, "cuda")
    assert not kept
    assert how == "torch.compile failed and is off: no compiler"
    assert not any(is_compiled(model))
    assert not any("forward" in vars(m) for m in model.modules())


def test_not_tried(model):
    for word, place in (("off", "cuda"), ("auto", "cpu")):
        assert compiling.compile_student(Config(dict(compile=word)), model, 4, place) == (False, "")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles with g++")
def test_a_compiled_run(tmp_path, monkeypatch):
    """Its losses are those of the run without; stopped and resumed with another word, it goes on compiled, exactly."""
    write_data(tmp_path)
    sizes = {"student_args": dict(depth=2, embed_dim=24, num_heads=2), "drop_path": 0.2, "precision": "fp32"}
    common = dict(data=tmp_path / "photos/train", img_size=32, batch_size=4, max_steps=4, save_every=2, workers=0)
    small = sizes | {"decoder": dict(dim=16, depth=1, heads=2)}
    teacher = pretrain("mae_tiny", **common, out=tmp_path / "t", cfg_options=small).student

    def run(name, word):
        options = sizes | {"compile": word, "micro_batch": 2}
        resume = (tmp_path / name).exists()
        return distill(**common, teacher=str(teacher), out=tmp_path / name, resume=resume, cfg_options=options)

    plain, whole = run("plain", "off"), run("whole", "on")
    assert whole.losses["loss"] == pytest.approx(plain.losses["loss"], rel=1e-4)
    go, steps = StepLoop.run_iter, []

    def stop(self, batch):
        steps.append(any(block._compiled_call_impl for block in self.runner.model.encoder.blocks))
        if len(steps) == 3:
            raise RuntimeError("stopped")
        return go(self, batch)

    monkeypatch.setattr(StepLoop, "run_iter", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run("stopped", "on")
    assert run("stopped", "on").student.read_bytes() == whole.student.read_bytes()
    assert steps == [True] * 5
