"""Several things timed in turns, so that a machine that slows down slows all of them. Standard library and numpy."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MIN_RUNS = 10


def interleave(
    runners: Sequence[Callable[[], float]], *, runs: int | None, seconds: float, warm_up: float = 0.5
) -> list[list[float]]:
    """Milliseconds of every runner, in turns; warm-up (at least twice, half a second) not counted."""
    for once in runners:
        began, count = time.monotonic(), 0
        while count < 2 or time.monotonic() - began < warm_up:
            once()
            count += 1
    times: list[list[float]] = [[] for _ in runners]
    began, turn = time.monotonic(), 0
    while turn < (runs or MIN_RUNS) or (runs is None and time.monotonic() - began < seconds * len(runners)):
        for i in range(len(runners)):
            at = (i + turn) % len(runners)
            times[at].append(runners[at]())
        turn += 1
    return times


def own_peak_mib() -> float:
    """Peak host memory of this process so far, MiB."""
    try:  # not ru_maxrss: on Linux that starts at the parent's size
        line = next(x for x in Path("/proc/self/status").read_text("utf-8-sig").splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
