"""What a run costs on 1 to 64 GPUs, on paper: operations, bytes over the links, milliseconds a step.

The model, per step of a global batch B on n GPUs, N of them in a machine (8):

- compute: B / n images times the FLOP of one (teachers included), at ``USED`` of the dense half-precision peak;
- bytes: G = 4 bytes per trained parameter. ddp's ring all-reduce sends 2 (n - 1) / n G from every GPU. fsdp here
  (:mod:`tinymim.engine.parallel`) sends as many: (n - 1) / n G to gather weights, as many to scatter gradients;
- links: inside a machine NVLink, between machines its InfiniBand, which its N GPUs share and over which a ring of all n
  sends as much again; the slower of the two counts, at ``LINK_USED`` of its rate; plus 2 log2(n) hops of latency for
  each of the collectives;
- overlap: all collectives but the last one run beside the backward pass (fsdp's gathers but the first beside the
  forward pass). Seen is what does not fit into that pass, and at least the share of one collective.

Sources: NVIDIA's data sheets of V100 SXM2 (125 TFLOP/s fp16, NVLink 300 GB/s both ways), A100 SXM (312 bf16, 600),
H100 SXM (989 bf16, 900), and of DGX-1 (4 x 100 Gbit/s InfiniBand), DGX A100 and DGX H100 (8 x 200 and 8 x 400 Gbit/s).
The ring: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009). ``USED`` and ``LINK_USED`` are assumptions, not
measured here, and attributes of :class:`Machine`. Data loading is not in it: the last column says how many photos a
second it must bring. ``tools/scaling.py`` holds the model against what can be measured without a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

USED, LINK_USED = 0.4, 0.8
COLLECTIVES = 6  # a step, see tinymim.engine.parallel.BUCKETS
GPUS = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind and their links.

    Attributes:
        name: Of the GPU.
        flops: Peak of one GPU, FLOP/s.
        inside: Bytes/s that a GPU sends to others of its machine.
        between: Bytes/s that a machine sends to others.
        gpus: In a machine.
        latency: Seconds of a hop inside and between machines.
        used: Share of ``flops`` that training reaches.
        link_used: Share of the links' rates that collectives reach.
    """

    name: str
    flops: float
    inside: float
    between: float
    gpus: int = 8
    latency: tuple[float, float] = (3e-6, 10e-6)
    used: float = USED
    link_used: float = LINK_USED


MACHINES = (
    Machine("V100", 125e12, 150e9, 50e9),
    Machine("A100", 312e12, 300e9, 200e9),
    Machine("H100", 989e12, 450e9, 400e9),
)


@dataclass(frozen=True)
class Step:
    """A step on n GPUs: seconds of compute, seconds of communication, those that are seen, bytes that a GPU sends."""

    compute: float
    links: float
    seen: float
    sent: float

    @property
    def seconds(self) -> float:
        """Of the whole step, without data loading."""
        return self.compute + self.seen


def sent_bytes(parameters: int, gpus: int) -> float:
    """Bytes that every GPU sends in a step, by ddp or fsdp alike, for this many trained float32 parameters."""
    return 2 * (gpus - 1) / gpus * 4 * parameters


def step_cost(
    machine: Machine, gpus: int, flop: float, backward: float, parameters: int, *, batch: int, strategy: str = "ddp"
) -> Step:
    """One step.

    Args:
        machine: The GPUs.
        gpus: Their number.
        flop: Of one image, forward and backward, teachers included.
        backward: Of it, the backward pass.
        parameters: Trained ones.
        batch: Global batch.
        strategy: "ddp" or "fsdp".
    """
    rate = machine.flops * machine.used * gpus / batch
    compute, sent = flop / rate, sent_bytes(parameters, gpus)
    if gpus == 1:
        return Step(compute, 0.0, 0.0, 0.0)
    spread = gpus > machine.gpus
    slowest = min(machine.inside, machine.between) if spread else machine.inside
    hops = 2 * math.log2(gpus) * machine.latency[spread] * COLLECTIVES
    links = sent / (slowest * machine.link_used) + hops
    if strategy == "ddp":
        seen = max(links - backward / rate, links / COLLECTIVES)
    else:
        passes = (backward / rate, (flop - backward) / rate)
        seen = sum(max(links / 2 - each, links / 2 / COLLECTIVES) for each in passes)
    return Step(compute, links, seen, sent)


def on_gpus(flop: float) -> str:
    """The time of a run on eight GPUs of each kind, by operations alone, in words.

    Args:
        flop: Of the whole run.
    """
    hours = [(m, flop / (m.gpus * m.flops * m.used) / 3600) for m in MACHINES]
    told = ", ".join(f"{m.name} {h:.1f} h" if h >= 0.1 else f"{m.name} minutes" for m, h in hours)
    peaks = ", ".join(f"{m.flops / 1e12:.0f}" for m in MACHINES)
    return f"on paper, on {MACHINES[0].gpus} GPUs: {told} (assumed: {USED:.0%} of the peaks, {peaks} TFLOP/s)"


def scaling_table(
    flop: float, backward: float, parameters: int, *, batch: int, steps: int, machines: Sequence[Machine] = MACHINES
) -> str:
    """The table of a dry run: milliseconds a step, what is seen of communication, hours of the run.

    Args:
        flop: See :func:`step_cost`.
        backward: See :func:`step_cost`.
        parameters: See :func:`step_cost`.
        batch: Global batch; numbers of GPUs that cannot share it are left out.
        steps: Of the run.
        machines: Columns.
    """
    used, links = machines[0].used, machines[0].link_used
    names = "".join(f" | {f'{m.name}: compute + links, run, photos/s':>38}" for m in machines)
    lines = [
        f"on paper ({used:.0%} of the peak, links at {links:.0%}, {machines[0].gpus} GPUs a machine; ddp):",
        f"GPUs  images each  MB sent each{names}",
    ]
    for gpus in (n for n in GPUS if batch % n == 0):
        cells = ""
        for machine in machines:
            step = step_cost(machine, gpus, flop, backward, parameters, batch=batch)
            took, hours = 1000 * step.compute, step.seconds * steps / 3600
            cells += f" | {took:9.1f} + {1000 * step.seen:5.2f} ms {hours:8.1f} h {batch / step.seconds:7.0f}"
        lines.append(f"{gpus:4}  {batch // gpus:11}  {sent_bytes(parameters, gpus) / 1e6:12.1f}{cells}")
    return "\n".join(lines)
