"""One command of ours in a forked child, with a memory and a time limit; torch is imported once, in the parent."""

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MORE_MEMORY = 3 * 2**30  # bytes of address space a command may add
WARM = ("tinymim.cli", "tinymim.engine", "tinymim.seg", "tinymim_export", "tinymim_export.cli", "tinymim_export.graph")
TRACEBACK, HANG, KILLED = "traceback", "hang", "killed"
BROKEN = 70  # exit code of a child that ended with a traceback


@dataclass
class Outcome:
    """What a command did: "worked", "error" (ours), "traceback", "hang" or "killed" (by a signal, or for memory)."""

    word: str
    text: str
    seconds: float


def warm_up() -> None:
    """Import everything heavy, so that a fork costs milliseconds."""
    for name in WARM:
        importlib.import_module(name)


def run(words: Sequence[object], folder: Path, seconds: float = 60) -> Outcome:
    """Run ``tinymim ...`` or ``tinymim-export ...`` in ``folder``.

    Args:
        words: The command line.
        folder: Working folder.
        seconds: Time limit.
    """
    said, began = folder.with_name(f"{folder.name}.said"), time.monotonic()

    def act() -> int:
        os.setpgid(0, 0)
        os.chdir(folder)
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limit = pages * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = [str(word) for word in words]
        return command(sys.argv)

    pid = child(act, said)
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Outcome(HANG, _read(said), time.monotonic() - began)
    text, took = _read(said), time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left behind
    if os.WIFSIGNALED(status):
        return Outcome(KILLED, f"signal {os.WTERMSIG(status)}\n{text}", took)
    code = os.WEXITSTATUS(status)
    if code == BROKEN or "Traceback (most recent call last)" in text:
        return Outcome(TRACEBACK, text, took)
    return Outcome("worked" if code == 0 else "error" if ": error: " in text else f"exit {code}", text, took)


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def command(words: Sequence[str]) -> int:
    """Run ``[tinymim] ...`` or ``tinymim-export ...`` in this process; its exit code."""
    if words[0] == "tinymim-export":
        from tinymim_export.cli import main as export

        return export(words[1:])
    from tinymim.cli import main

    return main(words[words[0] == "tinymim" :])


def child(act: Callable[[], int], log: Path) -> int:
    """Fork; the child runs ``act`` with its output in ``log`` and ends with its exit code. Returns its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = BROKEN
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
        code = act()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def fork(act: Callable[[], int], log: Path) -> int:
    """Run something in a forked child whose output goes to a file; its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child(act, log), 0)[1])
