"""Where the time of a training step goes, by kind of operation: PyTorch's profiler, each event's own time once.

An operation counts for the range it lies in (``attention``, ``loss``, the optimizer, the data loader), its backward for
the range of its forward, by PyTorch's sequence numbers; outside of these its name decides.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tinymim.benchmarks.turns import Turns

RANGES = {"attention": "attention", "loss": "loss", "Optimizer.": "optimizer", "enumerate(DataLoader)": "data"}
NAMES = {  # parts of an operation's name -> its kind; the first that fits
    "relation_loss": "loss",
    "scaled_dot_product": "attention",
    "layer_norm": "norm",
    "mm": "matrix products",
    "convolution": "matrix products",
    "linear": "matrix products",
    "copy": "copies and casts",
    "clone": "copies and casts",
    "::cat": "copies and casts",
    "::stack": "copies and casts",
    "::to": "copies and casts",
    "adam": "optimizer",
}
BACKWARD = "autograd::engine::evaluate_function"
KINDS = [*dict.fromkeys(["matrix products", *NAMES.values()]), "data", "elementwise", "rest"]


class ProfiledTurns(Turns):
    """Turns whose timed steps are profiled; their result has ``kinds``: kind -> ms per step."""

    def _start(self) -> None:
        super()._start()
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
        self.profiler.start()

    def after(self) -> None:
        super().after()
        if self.done == self.warm + self.timed:
            self.profiler.stop()
            self.kinds = {kind: ms / self.timed for kind, ms in by_kind(self.profiler.events()).items()}

    def _result(self) -> dict[str, Any]:
        return {**super()._result(), "kinds": self.kinds}


def mark(place: Any, name: str, kind: str) -> None:
    """Put a function of a module or class into one of :data:`RANGES`."""
    function: Callable[..., Any] = getattr(place, name)

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(kind):
            return function(*args, **kwargs)

    setattr(place, name, ranged)


def by_kind(events: Any) -> dict[str, float]:
    """Kind of :data:`KINDS` -> own milliseconds of its events: the GPU's where it worked, else the CPU's."""
    forward: dict[int, str] = {}  # sequence number -> range of the operation that has it
    for event in events:
        found = _range(event)
        if found in ("attention", "loss") and event.sequence_nr >= 0 and _backward(event) is None:
            forward[event.sequence_nr] = found
    gpu = sum(event.self_device_time_total for event in events) > 0
    total = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            continue  # a kernel: its time is that of the operation that launched it, too
        node = _backward(event)
        kind = _range(event) or (None if node is None else forward.get(node.sequence_nr)) or _kind(event.name)
        total[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000
    return total


def _chain(event: Any) -> list[Any]:
    chain = []
    while event is not None:
        chain.append(event)
        event = event.cpu_parent
    return chain


def _range(event: Any) -> str | None:
    """The innermost of :data:`RANGES` that an event lies in."""
    for each in _chain(event):
        for start, kind in RANGES.items():
            if each.name.startswith(start):
                return kind
    return None


def _backward(event: Any) -> Any:
    """The node of the backward pass that an event lies in, or None."""
    return next((each for each in _chain(event) if each.name.startswith(BACKWARD)), None)


def _kind(name: str) -> str:
    if "::" not in name or name.startswith(BACKWARD):
        return "rest"
    return next((kind for part, kind in NAMES.items() if part in name), "elementwise")
