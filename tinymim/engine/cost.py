"""Cost of a training run, measured by one step on random pixels before it starts."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tinymim.engine.model import saved_bytes
from tinymim.engine.scaling import on_gpus
from tinymim.errors import ConfigError

PROBE = 2  # images of the passes that count memory: batch norm needs more than one


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training run.

    Attributes:
        parameters: Number of trained parameters.
        bytes_per_image: Bytes that autograd keeps per image for the backward pass.
        gib: Memory per process, GiB: weights, gradients, AdamW's two moments, weights in half precision, and the
            activations of the images of one pass, times 1.5.
        flop_per_image: Forward and backward, teachers included.
        backward_flop_per_image: Of it, the backward pass.
        seconds_per_image: Forward and backward on this machine, without data loading.
        batch: Images per step and process.
        processes: Number of launched processes.
        steps: Steps of the schedule.
        size: Height and width of an image, pixels.
        device: "cpu" or "cuda".
    """

    parameters: int
    bytes_per_image: int
    gib: float
    flop_per_image: float
    backward_flop_per_image: float
    seconds_per_image: float
    batch: int
    processes: int
    steps: int
    size: tuple[int, int]
    device: str

    @property
    def images(self) -> int:
        """Images of the whole run."""
        return self.steps * self.batch * self.processes

    def __str__(self) -> str:
        hours, flop = self.seconds_per_image * self.images / 3600, self.flop_per_image * self.images
        return (
            f"dry run: {self.steps} steps of {self.batch} images of {self.size[0]}x{self.size[1]} on each of "
            f"{self.processes} process(es)\n"
            f"{self.parameters / 1e6:.2f} M trained parameters; about {self.gib:.1f} GiB per process "
            f"({self.bytes_per_image / 2**20:.1f} MiB per image); about {hours:.1f} hours on one {self.device} like "
            f"this ({1 / self.seconds_per_image:.2f} images/s without data loading and validation)\n"
            f"{self.flop_per_image / 1e9:.1f} GFLOP per image, forward and backward, teachers included: "
            f"{flop / 1e18:.3g} EFLOP; {on_gpus(flop)}"
        )


def check_memory(model: nn.Module) -> None:
    """Refuse a model whose weights alone are larger than this machine's memory; it may be on the meta device.

    Raises:
        ConfigError: it is.
    """
    need = 4 * sum(p.numel() for p in model.parameters())
    if hasattr(os, "sysconf") and need > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ConfigError(
            f"the model has {need / 4:.3g} parameters, {need / 2**30:.3g} GiB",
            f"this machine has {there / 2**30:.3g} GiB of memory",
            "choose a smaller width or depth",
        )


def measure_cost(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    per_pass: int,
    batch: int,
    processes: int,
    steps: int,
    size: tuple[int, int],
    device: str,
    timed: int = PROBE,
) -> TrainingCost:
    """Measure forward and backward passes on random pixels; the model keeps their gradients, no file is written.

    Args:
        model: In training mode, on its device.
        loss: Number of images -> their loss, a scalar.
        per_pass: Images that one pass of the run holds in memory.
        batch: Images per step and process.
        processes: Number of launched processes.
        steps: Steps of the run.
        size: Height and width of an image, pixels.
        device: "cpu" or "cuda".
        timed: Images of the passes that measure FLOP and seconds.
    """
    less, more = (saved_bytes(model, functools.partial(loss, count)) for count in (PROBE, PROBE + 1))
    per_image = max(more - less, 0)
    constant = max(less - PROBE * per_image, 0)  # e.g. weights in half precision
    with FlopCounterMode(display=False) as counter:  # also the warm-up
        value = loss(timed)
        forward = counter.get_total_flops()
        value.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.monotonic()
    loss(timed).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    need = 4 * sum(p.numel() for p in model.parameters()) + 12 * trained + constant + 1.5 * per_image * per_pass
    return TrainingCost(
        parameters=trained,
        bytes_per_image=per_image,
        gib=need / 2**30,
        flop_per_image=counter.get_total_flops() / timed,
        backward_flop_per_image=(counter.get_total_flops() - forward) / timed,
        seconds_per_image=seconds / timed,
        batch=batch,
        processes=processes,
        steps=steps,
        size=size,
        device=device,
    )
