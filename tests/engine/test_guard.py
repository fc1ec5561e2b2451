"""A loss that is not finite never reaches the weights, though nothing waits for it before the update is queued."""

import pytest
import torch
from torch import nn

from tests.engine.processes import launch
from tinymim.engine.job import keep_fused
from tinymim.engine.model import NonFiniteLoss, Trainable

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Toy(Trainable):
    def __init__(self):
        super().__init__(None)
        self.layer = nn.Linear(3, 1)

    def forward(self, image):
        return {"loss": self.layer(image).square().mean()}


def queue(model, optimizer, *batches):
    """A step of several passes, as on a GPU: their losses are read once the update is queued."""
    for x in batches:
        model.last_batch = {"image": x}
        loss = model(x)["loss"]
        model.passes.append((loss.detach(), model.last_batch))
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.check_finite()


@pytest.mark.parametrize("device", DEVICES)
def test_the_update_is_skipped_and_the_batch_named(device):
    model = Toy().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.guard(optimizer)
    good, bad = torch.ones(2, 3, device=device), torch.full((2, 3), torch.nan, device=device)
    queue(model, optimizer, good, good)
    assert not model.passes
    kept = model.layer.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        queue(model, optimizer, good, bad, good)
    assert torch.equal(model.layer.weight, kept)
    assert model.last_batch["image"] is bad
    queue(model, optimizer, good)
    assert not torch.equal(model.layer.weight, kept)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_loss_of_another_process(monkeypatch):
    """All processes refuse the step; the one whose loss it was has the batch."""
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.guard(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, _: flag.fill_(1))
    kept = model.layer.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="another process"):
        queue(model, optimizer, torch.ones(2, 3))
    assert torch.equal(model.layer.weight, kept)
    assert model.last_batch == {}


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
def test_sharded_weights(tmp_path, scaled):
    """FSDP2 on two processes, as on GPUs, also below a float16 loss scale: the loss of one of them stops both."""

    def run(rank):
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        model = Toy()
        torch.distributed.fsdp.fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model.guard(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)

        def step(x):
            model.last_batch = {"image": x}
            loss = model(x)["loss"]
            model.passes.append((loss.detach(), model.last_batch))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.check_finite()
            return model.layer.weight.full_tensor()

        good, bad = torch.ones(2, 3), torch.full((2, 3), torch.nan)
        kept = step(good)
        with pytest.raises(NonFiniteLoss, match="the loss is nan" if rank == 1 else "another process"):
            step(bad if rank == 1 else good)
        assert torch.equal(model.layer.weight.full_tensor(), kept)
        moved = step(good)
        assert moved.isfinite().all()
        assert not torch.equal(moved, kept)
        torch.distributed.barrier()

    for ended in launch(2, run, tmp_path):
        assert ended.code == 0, ended.text[-3000:]


def test_on_the_cpu_the_loss_is_refused_before_its_gradient():
    model = Toy()
    with pytest.raises(NonFiniteLoss, match="the loss is inf"):
        model.parse_losses({"loss": torch.tensor(torch.inf)})
    model.parse_losses({"loss": torch.tensor(1.0)})
    assert not model.passes


@pytest.mark.parametrize("device", DEVICES)
def test_the_state_of_an_older_run_is_loaded(device):
    """Its optimizer was not fused: the moments and steps are the same, and go on fused."""
    layer = nn.Linear(3, 1).to(device)
    layer(torch.ones(2, 3, device=device)).sum().backward()
    older = torch.optim.AdamW(layer.parameters(), lr=0.1)
    older.step()
    newer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    newer.register_load_state_dict_pre_hook(keep_fused)
    newer.load_state_dict(older.state_dict())
    copy, grad = layer.weight.detach().clone(), layer.weight.grad.clone()
    older.step()
    want = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(copy)
    layer.weight.grad = grad
    newer.step()
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-6, atol=1e-7)
    assert newer.param_groups[0]["fused"]
