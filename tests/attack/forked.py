"""One command of ours in a forked child, with a memory and a time limit; torch is imported once, in the parent."""

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MORE_MEMORY = 3 * 2**30  # bytes of address space a command may add
WARM = ("tinymim.cli", "tinymim.engine", "tinymim.seg", "tinymim_export", "tinymim_export.cli", "tinymim_export.graph")
TRACEBACK, HANG, KILLED = "traceback", "hang", "killed"


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


def run(command: Sequence[object], folder: Path, seconds: float = 60) -> Outcome:
    """Run ``tinymim ...`` or ``tinymim-export ...`` in ``folder``.

    Args:
        command: Its words.
        folder: Working folder.
        seconds: Time limit.
    """
    said, began = folder.with_name(f"{folder.name}.said"), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child([str(word) for word in command], folder, said)
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
    if code == 70 or "Traceback (most recent call last)" in text:
        return Outcome(TRACEBACK, text, took)
    return Outcome("worked" if code == 0 else "error" if ": error: " in text else f"exit {code}", text, took)


def _read(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _child(command: list[str], folder: Path, said: Path) -> None:
    """Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limit = pages * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = command
        if command[0] == "tinymim-export":
            from tinymim_export.cli import main
        else:
            from tinymim.cli import main
        code = main(command[1:])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 70)
