"""Segmentation on two processes (gloo): the losses of one, checkpoints that any strategy reads, ends without a hang."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.engine.processes import launch
from tests.seg.conftest import CROPS
from tinymim.cli import main
from tinymim.errors import ConfigError
from tinymim.seg import test_segmentor, train_segmentor
from tinymim.seg.hooks import RunFolderHook

GROUPS = dict(type="GN", num_groups=4)  # of one photo each: nothing depends on who else is in the batch
SAME = {  # and no random numbers but those of the photos, which follow the place in the run
    "model.backbone.drop_path_rate": 0.0,
    "model.backbone.norm_cfg": GROUPS,
    **{f"model.{head}.norm_cfg": GROUPS for head in ("decode_head", "auxiliary_head")},
    **{f"model.{head}.dropout_ratio": 0 for head in ("decode_head", "auxiliary_head")},
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "optim_wrapper.clip_grad.max_norm": 1.0,
}
ENDED = ("cut", "whole")


@pytest.fixture
def train(scenes, small):
    """``train(folder, batch, **more)``: a small run; ``batch`` is that of a process."""

    def run(folder, batch, **more):
        options = small(**SAME, **{"train_dataloader.batch_size": batch})
        return train_segmentor("upernet_tinymim_demo", work_dir=folder, data_root=scenes, cfg_options=options, **more)

    return run


def several(folder, run):
    for rank, ended in enumerate(launch(2, run, folder)):
        assert ended.code == 0, f"process {rank}: {ended.text[-3000:]}"


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_losses_are_those_of_one_process(train, tmp_path, strategy):
    """Also what is saved: a segmentor, and a checkpoint from which one process goes on."""
    one = train(tmp_path / "one", 4)
    several(tmp_path / "said", lambda _: train(tmp_path / "two", 2, strategy=strategy) and 0)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    states = [torch.load(tmp_path / name / "segmentor.pth", weights_only=True)["state_dict"] for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=2e-3)  # a few steps of AdamW's rate
    result = test_segmentor(None, tmp_path / "two" / "segmentor.pth")
    assert result.images == one.images == 5
    assert (result.confusion == json.loads((tmp_path / "two/result.json").read_text())["confusion"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_signal_to_one_process_stops_both_and_resume_is_exact(train, tmp_path, strategy):
    after = RunFolderHook.after_train_iter

    def interrupted(rank):
        def kill(self, runner, batch_idx, **rest):
            after(self, runner, batch_idx, **rest)
            if rank == 1 and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        RunFolderHook.after_train_iter = kill
        try:
            train(tmp_path / "cut", 2, strategy=strategy)
        except KeyboardInterrupt:
            return 0
        return 1

    several(tmp_path / "a", lambda _: train(tmp_path / "whole", 2, strategy=strategy) and 0)
    several(tmp_path / "b", interrupted)
    assert (tmp_path / "cut/checkpoints/iter_3.pth").is_file()
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    several(tmp_path / "c", lambda _: train(tmp_path / "cut", 2, strategy=strategy, resume=True) and 0)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (torch.load(tmp_path / name / "segmentor.pth", weights_only=True)["state_dict"] for name in ENDED)
    assert all(torch.equal(one[key], other[key]) for key in other)
    change = {"fsdp": "ddp", "ddp": "fsdp"}[strategy]
    several(tmp_path / "d", lambda _: train(tmp_path / "other", 2, strategy=change, resume=True) and 0)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hiera_tiny", "swin_tiny", "tinyvit_5m"])
def test_hierarchical_backbones(scenes, tmp_path, name):
    """Sharded and not, the same losses: blocks elsewhere, batch normalisation of each process's photos."""
    options = {
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
        **CROPS,
        "model.decode_head.channels": 16,
        "model.auxiliary_head.channels": 16,
        "default_hooks.checkpoint.log_interval": 1,
    }

    def train(strategy):
        folder = tmp_path / strategy
        config = f"upernet_{name}_camvid"
        train_segmentor(config, work_dir=folder, data_root=scenes, cfg_options=dict(options), strategy=strategy)
        return 0

    for strategy in ("ddp", "fsdp"):
        several(tmp_path / "said", lambda _: train(strategy))  # noqa: B023
    assert len(losses(tmp_path / "fsdp")) == 2
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(scenes, small, tmp_path, monkeypatch):
    words = ["segment", "upernet_tinymim_demo", "--data-root", str(scenes), "--work-dir", str(tmp_path / "run")]
    words += ["--cfg-options", *(f"{key}={value}" for key, value in small().items())]

    def run(rank):
        if rank == 1:
            monkeypatch.setattr("tinymim.seg.loop.ResumableTrainLoop._next", lambda *_: 1 / 0)
        return main(words)

    first, second = launch(2, run, tmp_path / "said", seconds=60)
    assert "ZeroDivisionError" in second.text
    assert first.code == 1
    assert "process 0 stops: another process of this job has ended" in first.text


def test_fsdp_needs_company(train, tmp_path):
    with pytest.raises(ConfigError, match="strategy=fsdp on one process"):
        train(tmp_path / "run", 2, strategy="fsdp")
    assert not (tmp_path / "run").exists()
