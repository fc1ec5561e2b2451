"""A command on several processes, as torchrun starts it: forked from the test, so that PyTorch is imported once."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Ended:
    """How one process ended: exit code (-9: it hung) and what it printed."""

    code: int
    text: str


def launch(count: int, run: Callable[[int], object], folder: Path, seconds: float = 100) -> list[Ended]:
    """Call ``run(rank)`` in ``count`` forked processes with the variables of torchrun.

    Args:
        count: Number of processes; 1: with no variables.
        run: Called with the rank; an int that it returns is the exit code.
        folder: Where their output goes.
        seconds: Time limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(rank, count, port, run, folder / f"{rank}.txt") for rank in range(count)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < count:
        late = time.monotonic() > deadline
        for pid in set(children) - set(codes):
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    texts = [(folder / f"{rank}.txt").read_text("utf-8", errors="replace") for rank in range(count)]
    return [Ended(codes[pid], text) for pid, text in zip(children, texts, strict=True)]


def _fork(rank: int, count: int, port: int, run: Callable[[int], object], said: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
        if count > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in (world | address).items()}
        found = run(rank)
        code = found if isinstance(found, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
