"""The relation loss that stores no relation: equal to the plain form, linear memory, kernel and chunked form alike."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tinymim.distill import relation_kl, relation_logits, relation_losses, relation_smooth_l1, tiled_relations
from tinymim.distill.tiled_relations import chunked, find_kernel, relation_loss
from tinymim.engine.model import saved_bytes

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def sides(batch, tokens, width_s, width_t, dtype=torch.float32, device="cpu"):
    """q, k, v of both sides as our models give them: views of one tensor; and the student's tensor."""
    torch.manual_seed(0)
    x, y = (torch.randn(batch, tokens, 3 * width).to(device, dtype) for width in (width_s, width_t))
    x.requires_grad_()
    return dict(zip("qkv", x.chunk(3, -1), strict=True)), dict(zip("qkv", y.chunk(3, -1), strict=True)), x


def plain(student, teacher, heads, relations=("qk", "vv"), softmax=True):
    """The losses from stored relations, in float32 (float64 of float64)."""
    compare, out = relation_kl if softmax else relation_smooth_l1, {}
    for a, b in relations:
        scores = []
        for side in (student, teacher):
            x, y = (side[n] if side[n].dtype is torch.float64 else side[n].float() for n in (a, b))
            if x.dtype is torch.float64:  # relation_logits makes float32 of everything
                x, y = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (x, y))
                scores.append(x @ y.transpose(2, 3) * x.shape[-1] ** -0.5)
            else:
                scores.append(relation_logits(x, y, heads))
        out[a + b] = compare(*scores)
    return out


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("dtype", "loss_rtol", "grad_rtol"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-6, 2e-6),
        (torch.bfloat16, 1e-6, 6e-3),
        (torch.float16, 1e-6, 1e-3),
    ],
)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("tile", [1 << 10, 1 << 19], ids=["rows", "images"])
def test_both_forms_are_one_loss(dtype, loss_rtol, grad_rtol, softmax, tile, device, monkeypatch):
    """Other widths on both sides, every pair of letters, tiles of few rows and of several images."""
    monkeypatch.setattr(tiled_relations, "TILE_BYTES", tile)
    student, teacher, x = sides(3, 70, 24, 40, dtype, device)
    loss_rtol = loss_rtol if device == "cpu" else max(loss_rtol, 1e-4 if dtype is torch.bfloat16 else 1e-5)
    for name in ("qk", "vv", "qq", "kv"):
        wanted = plain(student, teacher, 4, [name], softmax)[name]
        got = relation_losses(student, teacher, 4, [name], softmax)[name]
        torch.testing.assert_close(got, wanted, rtol=loss_rtol, atol=0)
        right, ours = (torch.autograd.grad(loss, x)[0].double() for loss in (wanted, got))
        assert (right - ours).norm() <= grad_rtol * right.norm(), name


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("one", [False, True])
def test_gradcheck(beta, one, monkeypatch):
    monkeypatch.setattr(tiled_relations, "TILE_BYTES", 256)
    _, teacher, x = sides(2, 5, 6, 4, torch.float64)
    taught = (teacher["q"],) * 2 if one else (teacher["q"], teacher["k"])

    def loss(x):
        q, k, _ = x.chunk(3, -1)
        return relation_loss((q, q) if one else (q, k), taught, 2, beta)

    assert torch.autograd.gradcheck(loss, (x,))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(x), x, create_graph=True)
    with torch.no_grad():
        torch.testing.assert_close(loss(x), loss(x.detach()))


def test_types_may_differ():
    """q and k in float32 (after a norm), v in bfloat16; another type on the teacher's side; under autocast."""
    student, teacher, x = sides(2, 9, 16, 8)
    mixed = {**student, "v": student["v"].bfloat16()}
    low = {name: y.bfloat16() for name, y in teacher.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = relation_losses(mixed, low, 2, ["qv", "qk"])
    wanted = plain(mixed, low, 2, ["qv", "qk"])
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(y[name], x)[0] for y in (got, wanted)), rtol=1e-2, atol=1e-6)


def test_checkpointing_and_compile():
    _, teacher, x = sides(2, 9, 16, 8)
    taught = teacher["q"], teacher["k"]

    def loss(x):
        return 2 * relation_loss(x.chunk(3, -1)[:2], taught, 2)

    wanted = torch.autograd.grad(loss(x), x)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for other in (lambda x: checkpoint(loss, x, use_reentrant=False), compiled):
        assert torch.equal(torch.autograd.grad(other(x), x)[0], wanted)


def test_cost_of_a_dry_run():
    """Operations are counted as for the plain form; kept are three gradients of the student's size, nothing else."""
    student, teacher, x = sides(2, 33, 16, 32)
    x.data = x.data.bfloat16()
    student = dict(zip("qkv", x.chunk(3, -1), strict=True))
    count = {}
    for name, losses in (("plain", plain), ("tiled", relation_losses)):
        with FlopCounterMode(display=False) as counter:
            sum(losses(student, teacher, 4).values()).backward()
        count[name] = counter.get_total_flops()
    assert count["plain"] == count["tiled"]
    kept = saved_bytes(torch.nn.Identity(), lambda: sum(relation_losses(student, teacher, 4).values()))
    assert kept == x.numel() * x.itemsize


def peak(losses, *sizes):
    """Most bytes that losses and their backward pass allocate at a time."""
    student, teacher, _ = sides(*sizes, dtype=torch.bfloat16)
    with profile(profile_memory=True) as watched:
        sum(losses(student, teacher, 12).values()).backward()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_memory_at_224():
    """At most a tenth of the plain form's."""
    batch = 8
    assert 10 * peak(relation_losses, batch, 197, 192, 768) <= peak(plain, batch, 197, 192, 768)


@pytest.mark.slow
def test_memory_at_512_and_1024():
    """At most a hundredth at 512 pixels; at 1024 a batch within 1 GiB that takes the plain form far more than 3."""
    batch = 8
    assert 100 * peak(relation_losses, batch, 1025, 192, 768) <= batch * peak(plain, 1, 1025, 192, 768)
    scores = 4 * 2 * 12 * 4097**2  # one tensor of the plain form, which keeps four
    assert 4 * scores > 3 * 2**30
    assert peak(relation_losses, 2, 4097, 192, 768) < 2**27


INTERPRETED = """
import torch
from tinymim.distill import tiled_relations
from tinymim.distill.tiled_relations import chunked, find_kernel, relation_loss

tiled_relations.takes_kernel = lambda device: True
for dtype in (torch.float32, torch.float16):
    rtol = 2e-6 if dtype is torch.float32 else 1e-3
    for one, beta in ((False, None), (True, None), (False, 0.5), (True, 0.5)):
        torch.manual_seed(0)
        (a, b), (c, d) = (torch.randn(1, 66, 6 * w).to(dtype).chunk(2, -1) for w in (24, 20))  # strided, padded
        pairs = (a, None if one else b, c, None if one else d)
        kernel = find_kernel(a.device, dtype, dtype, 24, 20, beta is None, one)
        assert kernel is not None
        for grad in (True, False):
            for got, wanted in zip(kernel(*pairs, 3, beta, grad), chunked(*pairs, 3, beta, grad)):
                assert got.shape == wanted.shape and got.dtype == wanted.dtype
                assert (got - wanted).float().norm() <= rtol * wanted.float().norm(), (dtype, one, beta)
"""


@pytest.mark.slow
def test_the_kernel_is_the_chunked_form():
    """Triton's interpreter runs the kernel without a GPU (in float32 and float16; it multiplies no bfloat16)."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "error::UserWarning:tinymim", "-c", INTERPRETED], check=True, env=env)


@pytest.mark.parametrize("fault", ["raises", "wrong", None])
def test_the_choice_of_a_kernel(fault, monkeypatch):
    """A kernel that fails or disagrees is named once and not used; one that agrees is."""

    def kernel(*call):
        if fault == "raises":
            raise RuntimeError("no such device")
        total, *grads = chunked(*call)
        return total * (2 if fault == "wrong" else 1), *grads

    place = types.SimpleNamespace(relation_loss=kernel)
    monkeypatch.setitem(sys.modules, "tinymim.distill.kernels.relation_loss", place)
    monkeypatch.setattr(tiled_relations, "takes_kernel", lambda device: True)
    find_kernel.cache_clear()
    student, teacher, _ = sides(2, 9, 16, 8)
    try:
        if fault:
            with pytest.warns(UserWarning, match="without their Triton kernel"):
                got = relation_losses(student, teacher, 2)
        else:
            got = relation_losses(student, teacher, 2)
        key = (torch.device("cpu"), torch.float32, torch.float32, 8, 4, True, False)
        assert find_kernel(*key) is (None if fault else kernel)
    finally:
        find_kernel.cache_clear()
    torch.testing.assert_close(got["qk"], plain(student, teacher, 2)["qk"])
