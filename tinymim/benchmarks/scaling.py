"""The cost model of several GPUs against what can be measured without one: gloo on this machine; docs/scaling.md.

Each process has one thread. First all-reduces of several sizes are timed: a latency and a rate. Then training steps, in
turns: without communication, with ddp, with fsdp. Predicted is the step without communication plus the bytes of
:func:`tinymim.engine.scaling.sent_bytes` at that rate; nothing overlaps here, as gloo computes on the same cores.
"""

import argparse
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils.flop_counter import FlopCounterMode

from tinymim.cli import run_command
from tinymim.distill import TinyMIM
from tinymim.engine.model import PretrainModel, parameter_groups
from tinymim.engine.parallel import average, shard
from tinymim.engine.scaling import scaling_table, sent_bytes
from tinymim.errors import ConfigError
from tinymim.files import environment, write_json, write_text
from tinymim.models import create_model

SIZES = (1, 1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # float32 numbers of the all-reduces
STUDENTS = {"T <- T": ("tinymim_vit_tiny", "tinymim_vit_tiny"), "S <- T": ("tinymim_vit_small", "tinymim_vit_tiny")}
PIXELS, IMAGES = 64, 8  # of a crop; of each process
LARGE = dict(embed_dim=1024, depth=24, num_heads=16)  # of a ViT-L
PAPER = {"B <- L": ("tinymim_vit_base", "large"), "S <- B": ("tinymim_vit_small", "tinymim_vit_base")}
PAPER |= {"T <- S": ("tinymim_vit_tiny", "tinymim_vit_small")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--out", default="docs/scaling.md", metavar="FILE", help="page; a .json is written beside it")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="numbers of processes")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind; the median counts")


def run(args: argparse.Namespace) -> int:
    """Measure, write the page."""
    if min(args.processes) < 2 or args.repeats < 1:
        raise ConfigError("nothing to compare", "two processes and one step are the least", "use --processes 2")
    page = Path(args.out)
    found: dict[str, Any] = {"environment": environment(), "images": IMAGES, "pixels": PIXELS, "runs": []}
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_measure, args=(count, args.repeats, Path(folder)), nprocs=count)
            found["runs"].append(torch.load(Path(folder) / "found", weights_only=True))
    write_json(page.with_suffix(".json"), found)
    write_text(page, describe(found))
    print(f"{page}\n{page.with_suffix('.json')}")
    return 0


def build(student: str, teacher: str, pixels: int) -> PretrainModel:
    """A distillation as its recipe builds it, with random weights."""
    torch.manual_seed(0)
    large: dict[str, Any] = LARGE if teacher == "large" else {}
    own = create_model(student, img_size=pixels)
    other = create_model("tinymim_vit_base" if large else teacher, img_size=pixels, **large)
    return PretrainModel(TinyMIM(own, other)).train()


def _measure(rank: int, count: int, repeats: int, folder: Path) -> None:
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
        wrapper = OptimWrapper(torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4))
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


def fit(reduced: Sequence[Sequence[float]], count: int) -> tuple[float, float]:
    """Latency in seconds and rate in bytes/s of all-reduces: from the smallest and the largest one."""
    (_, latency), (size, seconds) = reduced[0], reduced[-1]
    return latency, 2 * (count - 1) / count * size / (seconds - latency)


def describe(found: dict[str, Any]) -> str:
    """The page."""
    env = found["environment"]
    lines = [
        "# Several GPUs, on paper",
        "",
        "`tinymim distill --dry-run` prints such a table for its run. The model, its sources and what it assumes of",
        "overlap are in `tinymim/engine/scaling.py`; no GPU was at hand for these numbers.",
        "",
    ]
    for name, (student, teacher) in PAPER.items():
        lines += [f"{name} at 224 pixels, 300 epochs of ImageNet-1k, global batch 4,096:", "", "```"]
        lines += [paper(student, teacher), "```", ""]
    lines += [
        "## Held against what can be measured",
        "",
        f"{platform.system()}, {env['cpu']}, {env['cores']} cores, torch {env['versions']['torch']}; gloo, one thread",
        f"a process, {found['images']} images of {found['pixels']} pixels on each, float32; medians, kinds of step in",
        "turns. Predicted: the step without communication (of as many processes at once), plus six latencies and the",
        "bytes at gloo's rate.",
        "",
    ]
    for each in found["runs"]:
        count = each["processes"]
        latency, rate = fit(each["all_reduce"], count)
        sizes = ", ".join(f"{size / 1e6:.3g} MB {1000 * took:.3g} ms" for size, took in each["all_reduce"])
        lines += [
            f"{count} processes. All-reduce: {sizes}: {1e6 * latency:.0f} us and {rate / 1e9:.2f} GB/s.",
            "",
            "| student <- teacher | MB sent | step alone, ms | predicted, ms | ddp, ms | fsdp, ms | ddp : predicted |",
            "|---|---|---|---|---|---|---|",
        ]
        for step in each["steps"]:
            predicted = step["alone"] + step["sent"] / rate + 6 * latency
            cells = [step["sent"] / 1e6, *(1000 * s for s in (step["alone"], predicted, step["ddp"], step["fsdp"]))]
            ratio = step["ddp"] / predicted
            lines += [f"| {step['name']} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {ratio:.2f} |"]
        lines += [""]
    return "\n".join([*lines, "Written by `tools/scaling.py`.", ""])


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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("scaling", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
