"""Several things timed in turns, so that a machine that slows down slows all of them. Standard library and numpy."""

import time
from collections.abc import Callable, Sequence

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
