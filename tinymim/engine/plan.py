"""The plan of a run before it starts: batch, steps, rate, micro-batch by memory, and the dry run."""

import math
import os
from dataclasses import dataclass, field

import torch
from mmengine.config import Config

from tinymim.compat import is_first_process, launched_processes
from tinymim.engine.cost import TrainingCost, measure_cost
from tinymim.engine.model import Trainable, saved_bytes_per_image
from tinymim.engine.scaling import scaling_table
from tinymim.errors import ConfigError


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


def micro_batch(config: Config, model: Trainable, share: int, place: str) -> int:
    """Images per pass: the largest divisor of this process's share whose activations fit in 60 % of the free memory."""
    if config.micro_batch:
        limit = int(config.micro_batch)
    else:
        if place == "cuda":
            free = torch.cuda.mem_get_info()[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
        limit = max(int(0.6 * free / (1.5 * saved_bytes_per_image(model, model.example(config, 3, place)))), 1)
        if place == "cpu":
            limit = min(limit, 128)
    if torch.distributed.is_initialized():
        common = torch.tensor(limit, device=place)
        torch.distributed.all_reduce(common, torch.distributed.ReduceOp.MIN)
        limit = int(common)
    return next(n for n in range(min(limit, share), 0, -1) if share % n == 0)


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
        print(cost)
        flop, backward, parameters = cost.flop_per_image, cost.backward_flop_per_image, cost.parameters
        print(scaling_table(flop, backward, parameters, batch=plan.batch, steps=plan.steps))
    return cost
