"""The plan of a run before it starts: batch, steps, rate, micro-batch by memory, and the dry run."""

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.config import Config

from tinymim.compat import is_first_process, launched_processes
from tinymim.cores import free_memory
from tinymim.engine.cost import TrainingCost, measure_cost
from tinymim.engine.model import Trainable, kept_buffers, saved_bytes_per_image
from tinymim.engine.scaling import scaling_table
from tinymim.errors import ConfigError
from tinymim.progress import say

TRIED, ROUNDS, PATIENCE = 4, 3, 90.0  # numbers of images per pass that "auto" times, how often, seconds in all


@dataclass
class Plan:
    """The plan of a run, printed before it starts."""

    photos: int
    batch: int
    steps_per_epoch: int
    steps: int
    warmup: int
    peak_lr: float
    micro_batch: int = 1
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.photos} photos, {self.steps_per_epoch} steps per epoch, {self.steps} steps of {self.batch} images "
            f"({self.micro_batch} per pass and process), warm-up {self.warmup}, peak rate {self.peak_lr:.3g}"
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def make_plan(config: Config, photos: int, world: int, lr: float | None, max_steps: int | None) -> Plan:
    """Batch, steps and rate; a dataset smaller than the batch lowers batch and rate, with a note.

    Raises:
        ConfigError: a batch that the processes cannot share, no steps, or an impossible rate.
    """
    if lr is not None and not 0 < lr < math.inf:
        raise ConfigError(f"the rate is {lr}", "it must be positive and finite", "use e.g. --lr 1e-3")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps {max_steps}", "a run needs at least one step", "use --max-steps 1 or more")
    batch, notes = config.batch_size, []
    if photos < batch:
        batch = max(photos // world, 1) * world
        notes.append(
            f"{photos} photos are fewer than the batch of {config.batch_size}: batch {batch}"
            + ("" if lr else ", and the rate is scaled with it")
        )
    if batch % world or photos < world:
        raise ConfigError(
            f"a global batch of {batch} cannot be shared by {world} processes",
            "each process takes an equal part",
            f"use --batch-size {max(batch // world, 1) * world}",
        )
    per_epoch = photos // batch
    steps = max(round(config.epochs * per_epoch), 1)
    warmup = round(config.warmup_epochs * per_epoch)
    if max_steps is not None and max_steps < steps:
        steps = max_steps
    if warmup >= steps:
        warmup = max(round(0.05 * steps), 0)
        notes.append(f"the warm-up was shortened to {warmup} of {steps} steps")
    return Plan(photos, batch, per_epoch, steps, warmup, lr or config.base_lr * batch / 256, notes=notes)


def padding(img_size: int, patch: int) -> list[str]:
    """A note if images are not a whole number of patches; else an empty list."""
    padded = -(-img_size // patch) * patch
    return [f"{img_size} pixels are not a multiple of the patch size {patch}: images are zero-padded to {padded}"] * (
        padded > img_size
    )


def micro_batch(config: Config, model: Trainable, share: int, place: str) -> tuple[int, str]:
    """Images per pass: a divisor of this process's share of the batch, the same in all processes.

    A number in the recipe is the most images of a pass. None: as many as fit in 60 % of the free memory by what the
    backward pass needs of an image. "auto": the fastest of these and smaller ones, see :func:`time_passes`.

    Returns:
        The number, and a line about how "auto" found it, else "".

    Raises:
        ConfigError: a GPU's memory does not hold the smallest pass that is tried.
    """
    auto = config.micro_batch == "auto"
    if config.micro_batch and not auto:
        limit = int(config.micro_batch)
    else:
        free = torch.cuda.mem_get_info()[0] if place == "cuda" else free_memory()
        limit = max(int(0.6 * free / (1.5 * saved_bytes_per_image(model, model.example(config, 3, place)))), 1)
        if place == "cpu":
            limit = min(limit, 128)
        elif auto:
            limit *= 2  # what does not fit after all is found out
    limit = int(_common(limit, torch.distributed.ReduceOp.MIN, place))
    fits = [n for n in range(min(limit, share), 0, -1) if share % n == 0]
    if not auto:
        return fits[0], ""
    tried = fits[:1]
    for n in fits:  # at most half as many images each time
        if 2 <= n <= tried[0] // 2 and len(tried) < TRIED:
            tried.insert(0, n)
    seconds = time_passes(config, model, tried, place)
    if not seconds:
        raise ConfigError(
            f"a pass of {tried[0]} image(s) does not fit in the GPU's memory",
            "weights, gradients, moments and activations need more",
            f"add --micro-batch {max(tried[0] // 4, 1)} or --grad-checkpointing, or choose a smaller model",
        )
    best = min(seconds, key=lambda n: seconds[n])
    speeds = ", ".join(f"{n}: {1 / each:.3g}" for n, each in seconds.items())
    return best, f"images/s by images per pass: {speeds}; the run takes {best}"


def time_passes(config: Config, model: Trainable, sizes: list[int], place: str) -> dict[int, float]:
    """Time forward and backward passes of random pixels, sizes in turns, and leave the model as it was.

    Args:
        config: The recipe.
        model: In its place, prepared.
        sizes: Images per pass, rising; the same in all processes, which measure at once.
        place: "cpu" or "cuda".

    Returns:
        Size -> median seconds per image, of the slowest process. Sizes that a GPU's memory does not hold beside AdamW's
        moments are left out, and large ones where :data:`PATIENCE` is short.
    """
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = torch.empty(2 * trained if place == "cuda" else 0, device=place)

    def seconds(n: int) -> float:
        return _common(_pass_seconds(model, config, n, place), torch.distributed.ReduceOp.MAX, place)

    devices = [torch.cuda.current_device()] if place == "cuda" else []
    with torch.random.fork_rng(devices=devices), kept_buffers(model):
        seconds(sizes[0])  # warm up
        each = seconds(sizes[0]) / sizes[0]
        found: dict[int, list[float]] = {
            n: [] for i, n in enumerate(sizes) if not i or 2 * each * sum(sizes[: i + 1]) <= PATIENCE
        }
        spent = 0.0
        for _ in range(ROUNDS):
            for n in found:
                if spent > PATIENCE:
                    break
                found[n].append(seconds(n))
                if found[n][-1] == math.inf:  # nor do larger ones fit
                    found = {fits: times for fits, times in found.items() if fits < n}
                    break
                spent += found[n][-1]
    del moments
    model.zero_grad(set_to_none=True)
    model.last_batch = {}
    return {n: statistics.median(times) / n for n, times in found.items() if times}


def _pass_seconds(model: Trainable, config: Config, count: int, place: str) -> float:
    """Seconds of a forward and backward pass; infinite if it does not fit in a GPU's memory."""
    try:
        batch = model.example(config, count, place)
        if place == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        model(**batch)["loss"].backward()
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    except torch.OutOfMemoryError:
        model.last_batch = {}
    torch.cuda.empty_cache()  # once the error no longer holds the pass's tensors
    return math.inf


def _common(value: float, which: Any, place: str) -> float:
    """The smallest or largest value of all processes."""
    if not torch.distributed.is_initialized():
        return value
    common = torch.tensor(float(value), dtype=torch.float64, device=place)
    torch.distributed.all_reduce(common, which)
    return float(common)


def measure(model: Trainable, config: Config, plan: Plan, place: str) -> TrainingCost:
    """Measure, print and return the cost of the run with a few passes on random pixels; no file is written."""
    model.train()
    world = launched_processes()
    cost = measure_cost(
        model,
        lambda count: model(**model.example(config, count, place))["loss"],
        per_pass=plan.micro_batch,
        batch=plan.batch // world,
        processes=world,
        steps=plan.steps,
        size=(config.img_size, config.img_size),
        device=place,
        timed=min(plan.micro_batch, 8),
    )
    if is_first_process():
        say(cost)
        flop, backward, parameters = cost.flop_per_image, cost.backward_flop_per_image, cost.parameters
        say(scaling_table(flop, backward, parameters, batch=plan.batch, steps=plan.steps))
    return cost
