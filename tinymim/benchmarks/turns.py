"""Training steps measured in turns: each contender in a process of its own, one of them running at a time.

A round gives every contender one turn, the order rotated, so a machine that slows down slows all of them; and each
process has a peak memory of its own. Standard library only here: the contenders bring PyTorch.
"""

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tinymim.errors import TinyMIMError

START = "forkserver"  # no process inherits the threads or the device of the one that gives the turns
LIMIT = 600.0  # seconds that a turn, or the start of a contender, may take


class Ended(BaseException):
    """No more turns: leaves a training loop that would go on."""


class Turns:
    """A contender's side: it calls :meth:`before` and :meth:`after` around every step.

    Args:
        pipe: To the process that gives the turns.
        wait: Waits until the device has done what was asked of it.
        peak: The process's peak memory in MiB.
    """

    def __init__(self, pipe: Any, wait: Callable[[], object], peak: Callable[[], float]) -> None:
        self.pipe, self.wait, self.peak = pipe, wait, peak
        self.warm = self.timed = self.done = 0
        self.began: float | None = None
        self.waited = 0.0

    def before(self, waited: float = 0.0) -> None:
        """A step begins, after ``waited`` seconds for its data; here a contender waits for its turn."""
        if self.done == self.warm + self.timed:
            self.pipe.send({"peak_mib": self.peak()} if not self.done else self._result())
            turn = self.pipe.recv()
            if turn is None:
                raise Ended
            self.warm, self.timed = turn
            self.done, self.waited, self.began = 0, 0.0, None
            if not self.warm:
                self._start()
        elif self.began is not None:
            self.waited += waited

    def after(self) -> None:
        """A step has ended."""
        self.done += 1
        if self.done == self.warm:
            self._start()
        elif self.done == self.warm + self.timed:
            self.wait()
            self.ended = time.perf_counter()

    def _start(self) -> None:
        self.wait()
        self.began = time.perf_counter()

    def _result(self) -> dict[str, Any]:
        assert self.began is not None
        return {"seconds": self.ended - self.began, "waited": self.waited, "peak_mib": self.peak()}


class Contender:
    """The other side of :class:`Turns`: a process that takes turns until it is closed or fails.

    Args:
        name: What results call it.
        body: Called in the new process, importable there, with ``spec`` and a pipe for its :class:`Turns`.
        spec: What it builds; picklable.
        memory: GiB it may take at most (data, not the programs' code); None: no limit.

    Attributes:
        failed: Why it takes no more turns, or None.
        seconds: Of each turn, per step.
        waited: Of each turn, the share of the time in which it waited for data.
        peak_mib: Peak memory of the process so far.
    """

    def __init__(self, name: str, body: Callable[[Any, Any], None], spec: Any, memory: float | None = None) -> None:
        self.name, self.peak_mib = name, 0.0
        self.failed: str | None = None
        self.forget()
        here, there = multiprocessing.Pipe()
        self.pipe: Any = here
        context: Any = multiprocessing.get_context(START)
        if START == "forkserver":
            context.set_forkserver_preload([body.__module__])  # every contender has its imports at once
        self.process = context.Process(target=_run, args=(body, spec, there, memory), daemon=False)
        self.process.start()
        there.close()
        self._answer()

    def forget(self) -> None:
        """Drop what was measured."""
        self.seconds: list[float] = []
        self.waited: list[float] = []

    def turn(self, warm: int, timed: int) -> dict[str, Any] | None:
        """Have it run ``warm`` steps, then ``timed`` ones; what :class:`Turns` tells of these, None if it failed."""
        if self.failed is None:
            self.pipe.send((warm, timed))
            return self._answer()
        return None

    def close(self) -> None:
        """End the process."""
        if self.failed is None and self.process.is_alive():
            self.pipe.send(None)
            self.process.join(20)
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        self.pipe.close()

    def _answer(self) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = (
                self.pipe.recv() if self.pipe.poll(LIMIT) else {"failed": f"no answer for {LIMIT:.0f} s"}
            )
        except EOFError:
            self.process.join()
            answer = {"failed": f"the process ended with {self.process.exitcode} (-9: out of memory)"}
        self.failed = answer.get("failed")
        if self.failed is not None:
            return None
        self.peak_mib = answer["peak_mib"]
        return answer


def measure(contenders: Sequence[Contender], *, rounds: int, seconds: float, warm: int) -> None:
    """Rounds of turns; results are in ``seconds`` and ``waited`` of each contender that did not fail.

    Args:
        contenders: In the order of the first round.
        rounds: Turns of each.
        seconds: What a turn is to take at least; decides its steps.
        warm: Steps before each turn that do not count.
    """
    steps = {}
    for each in contenders:
        tried = each.turn(warm or 1, 1)
        steps[each.name] = max(1, round(seconds / tried["seconds"])) if tried else 1
    for turn in range(rounds):
        for i in range(len(contenders)):
            each = contenders[(i + turn) % len(contenders)]
            result = each.turn(warm, steps[each.name])
            if result is not None:
                each.seconds.append(result["seconds"] / steps[each.name])
                each.waited.append(result["waited"] / result["seconds"])


def _run(body: Callable[[Any, Any], None], spec: Any, pipe: Any, memory: float | None) -> None:
    """The new process: what a body prints is dropped, its end or error is told."""
    if memory is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        body(spec, pipe)
    except (Ended, KeyboardInterrupt, EOFError, BrokenPipeError):  # the last two: who gives the turns has ended
        return
    except TinyMIMError as error:
        pipe.send({"failed": error.what})
    except Exception as error:
        text = (str(error).splitlines() or [""])[0][:200]
        memory = isinstance(error, MemoryError) or "memory" in text or type(error).__name__ == "OutOfMemoryError"
        pipe.send({"failed": "does not fit in memory" if memory else f"{type(error).__name__}: {text}"})
