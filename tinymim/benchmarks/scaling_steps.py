"""Steps of several gloo processes on this machine, and the operations of published schedules; see scaling.py.

Each process has one thread.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from tinymim.distill import TinyMIM
from tinymim.engine.model import PretrainModel, parameter_groups
from tinymim.engine.parallel import average, shard
from tinymim.engine.scaling import scaling_table, sent_bytes
from tinymim.models import create_model

SIZES = (1, 1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # float32 numbers of the all-reduces
STUDENTS = {"T <- T": ("tinymim_vit_tiny", "tinymim_vit_tiny"), "S <- T": ("tinymim_vit_small", "tinymim_vit_tiny")}
PIXELS, IMAGES = 64, 8  # of a crop; of each process
LARGE = dict(embed_dim=1024, depth=24, num_heads=16)  # of a ViT-L


def build(student: str, teacher: str, pixels: int) -> PretrainModel:
    """A distillation as its recipe builds it, with random weights."""
    torch.manual_seed(0)
    large: dict[str, Any] = LARGE if teacher == "large" else {}
    own = create_model(student, img_size=pixels)
    other = create_model("tinymim_vit_base" if large else teacher, img_size=pixels, **large)
    return PretrainModel(TinyMIM(own, other)).train()


def measure_processes(rank: int, count: int, repeats: int, folder: Path) -> None:
    """All-reduces and steps in one of ``count`` processes; the first writes ``folder/found``."""
    torch.set_num_threads(1)  # a core each
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    reduced = [(4 * size, _seconds(lambda x: dist.all_reduce(x), torch.ones(size), repeats)) for size in SIZES]
    steps = [_steps(name, *models, count, repeats) for name, models in STUDENTS.items()]
    if rank == 0:
        torch.save({"processes": count, "all_reduce": reduced, "steps": steps}, folder / "found")
    dist.destroy_process_group()


def _seconds(call: Callable[[Any], object], given: Any, repeats: int) -> float:
    """Median of calls that all processes begin together."""
    taken = []
    for _ in range(repeats + 2):
        dist.barrier()
        began = time.perf_counter()
        call(given)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def _steps(name: str, student: str, teacher: str, count: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a step of each kind, in turns."""
    from mmengine.optim import OptimWrapper

    batch = {"image": torch.randint(0, 256, (IMAGES, 3, PIXELS, PIXELS), dtype=torch.uint8)}
    batch["student_image"] = batch["image"].clone()
    kinds: dict[str, tuple[Any, Any]] = {}
    for kind in ("alone", "ddp", "fsdp"):
        model: Any = build(student, teacher, PIXELS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if kind != "alone":
            model = average(model, "cpu") if kind == "ddp" else shard(model, batch, "cpu")
        wrapper = OptimWrapper(torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True))
        wrapper.initialize_count_status(model, 0, 1 << 20)
        kinds[kind] = model, wrapper
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 2):
        for kind, (model, wrapper) in kinds.items():
            taken[kind].append(_seconds_once(functools.partial(model.train_step, batch, wrapper)))
    medians = {kind: statistics.median(values[2:]) for kind, values in taken.items()}
    return {"name": name, "parameters": trained, "sent": sent_bytes(trained, count), **medians}


def _seconds_once(call: Callable[[], object]) -> float:
    """Until the slowest process has done it."""
    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def paper(student: str, teacher: str) -> str:
    """The table of a dry run of the published schedule; operations are counted in one pass."""
    model = build(student, teacher, 224)
    image = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        loss = model(image=image, student_image=image)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    flop, trained = counter.get_total_flops(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return scaling_table(flop, flop - forward, trained, batch=4096, steps=93_600)
