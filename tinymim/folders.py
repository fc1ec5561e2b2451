"""Run folders: one writer at a time, replaced only if they are ours, without what killed processes left. No torch."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.files import HOST, file_error
from tinymim.progress import say
from tinymim.schema import read_json

LOCK = ".tinymim.lock"  # "PID HOST", and " new" as long as all that is in the folder may be removed
MARKS = ("config.py", "env.json", "chain.json", "demo.json", "tune.json")  # a run has begun in this folder
KEYS = {"env.json": "versions", "chain.json": "hops", "demo.json": "stages"}  # what these files hold if they are ours
DAY = 86_400.0  # seconds


@dataclass
class OpenRun:
    """A run folder that this process alone writes to.

    Attributes:
        path: The folder.
        fresh: Whether the run starts from the beginning; else it is resumed.
        begun: Whether :meth:`begin` was called; if not, the folder is left as it was found.
    """

    path: Path
    fresh: bool
    begun: bool = False
    _lock: int = -1
    _found: list[Path] = field(default_factory=list)

    def begin(self) -> None:
        """All is built: from here on the folder is this run's. What an earlier, replaced run wrote is removed now.

        Raises:
            TinyMIMError: it cannot be removed.
        """
        if self.fresh:
            _sign(self._lock, new=True)  # killed from here on, the run starts again
            _remove(self._found)
        self.begun = True


@contextlib.contextmanager
def open_run(
    out: str | Path, *, resume: bool = False, overwrite: bool = False, option: str = "--out"
) -> Iterator[OpenRun]:
    """Hold a run folder, created if missing, until the block ends; no two processes write to one.

    The lock is the kernel's, so a killed process leaves none. Temporary files of killed processes are removed.

    Args:
        out: The folder.
        resume: Continue the run in it.
        overwrite: Replace the run in it, once :meth:`OpenRun.begin` is called.
        option: What the command calls the folder, for errors.

    Raises:
        ConfigError: the folder is in use, holds a run and neither ``resume`` nor ``overwrite`` was given, holds no run
            to resume, is to be replaced and was not written by a run, or cannot be created.
    """
    out = Path(out)
    if not (out / LOCK).exists():  # else the lock decides first
        _check(out, "", resume, overwrite, option)
    made = [path for path in (out, *out.parents) if not path.exists()]
    lock, left = _take(out, option)
    run = OpenRun(out, fresh=False, _lock=lock)
    try:
        run.fresh = _check(out, left, resume, overwrite, option)
        remove_dead_parts(out, deep=True)
        run._found = [path for path in out.iterdir() if path.name != LOCK]
        _sign(lock, new=run.fresh and (not run._found or _killed(out, left)))
        yield run
    finally:
        with contextlib.suppress(TinyMIMError, OSError):
            if run.fresh and not run.begun:
                _remove(path for path in list(out.iterdir()) if path.name != LOCK and path not in run._found)
        let_go(out / LOCK, lock, made)


@contextlib.contextmanager
def hold(folder: str | Path, option: str = "--out") -> Iterator[None]:
    """Hold a folder, created if missing, for a command that continues by itself what it finds there.

    Raises:
        ConfigError: it is in use, or cannot be created.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, _ = _take(folder, option)
    try:
        remove_dead_parts(folder, deep=True)
        yield
    finally:
        let_go(folder / LOCK, lock, made)


def remove_dead_parts(folder: str | os.PathLike[str], *, deep: bool = False) -> None:
    """Remove the temporary files of :func:`tinymim.files.atomic_path` whose process was killed.

    A process number that this machine has given to a younger process does not protect a file; another machine's files
    are removed when they have not been written to for a day.

    Args:
        folder: Folder to look into.
        deep: Also look into the folders below it.
    """
    for here, below, names in os.walk(folder):  # a folder that another process removes meanwhile is passed over
        if not deep:
            below.clear()
        for name in names:
            match = re.fullmatch(r"\..+?\.(\d+)(?:\.([A-Za-z0-9-]+))?\.part", name)
            if match is not None:
                _remove_if_dead(Path(here, name), int(match[1]), match[2])


def _remove_if_dead(part: Path, process: int, host: str | None) -> None:
    """Remove a temporary file unless the process that writes it may live."""
    if part.is_symlink():
        return
    with contextlib.suppress(OSError):
        written = part.stat().st_mtime
        if host not in (None, HOST):
            dead = time.time() - written > DAY
        else:
            dead = process == os.getpid() or written < _started(process)
        if dead:
            part.unlink()


def _started(pid: int) -> float:
    """When a process of this machine started, seconds since 1970; infinity: it does not run, 0: unknown."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        pass
    except (OSError, OverflowError):
        return float("inf")
    with contextlib.suppress(OSError, IndexError, ValueError, StopIteration):
        ticks = int(Path(f"/proc/{pid}/stat").read_text("utf-8-sig", "replace").rpartition(")")[2].split()[19])
        lines = Path("/proc/stat").read_text("utf-8-sig", "replace").splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        return boot + ticks / os.sysconf("SC_CLK_TCK") - 2.0  # both are rounded
    return 0.0


def _names(out: Path) -> set[str]:
    """Names in a folder, without the lock and temporary files."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return {name for name in names if name != LOCK and not re.fullmatch(r"\..+\.part", name)}


def _killed(out: Path, left: str) -> bool:
    """Whether the last process was killed while it built its run, or removed an earlier one; ``left``: its lock."""
    return left.endswith(" new") and not _names(out) & set(MARKS)


def _check(out: Path, left: str, resume: bool, overwrite: bool, option: str) -> bool:
    """Whether the run in ``out`` starts from the beginning; nothing is changed.

    Raises:
        ConfigError: see :func:`open_run`.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite", "one keeps the run, the other replaces it", "leave one out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "a run writes a folder", f"choose another {option}")
    try:
        killed, used = _killed(out, left), bool(_names(out))
    except OSError as error:
        raise ConfigError(f"cannot read the folder {out}", str(error.strerror), f"choose another {option}") from error
    if killed:
        if resume:
            say(f"note: {out} was stopped before its first checkpoint; it starts again at step 0")
        return True
    if resume and not used:
        raise ConfigError(f"{out} holds no run to resume", "the folder is missing or empty", "leave --resume out")
    if used and overwrite:
        _check_ours(out, left, option)
    elif used and not resume:
        free = next(name for i in range(2, 10_000) if not (name := out.with_name(f"{out.name}-{i}")).exists())
        raise ConfigError(
            f"{out} already holds a run",
            "two runs in one folder would mix their files",
            f"add --resume to continue it, --overwrite to start again, or {option} {free}",
        )
    return not resume


def _check_ours(out: Path, left: str, option: str) -> None:
    """Refuse to empty a folder that no run of ours has written.

    Raises:
        ConfigError: it does not look like a run, or it holds the home or the working folder.
    """
    here = out.resolve()
    kept = [folder for folder in (Path.home(), Path.cwd()) if folder.resolve().is_relative_to(here)]
    if kept:
        raise ConfigError(
            f"{out} is not replaced", f"{kept[0]} would be removed with it", f"choose a new folder as {option}"
        )
    if not (left.endswith(" new") or any(_has_key(out / name, key) for name, key in KEYS.items())):
        raise ConfigError(
            f"{out} is not replaced",
            f"it does not look like a run of tinymim (no {', '.join(KEYS)}): its files may be others'",
            f"choose a new folder as {option}, or remove this one yourself",
        )


def _has_key(path: Path, key: str) -> bool:
    """Whether a file holds a JSON object with a key."""
    try:
        return path.is_file() and key in read_json(path, dict[str, Any])
    except (OSError, DataError):
        return False


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, first the marks of a run; links are removed, not followed.

    Raises:
        TinyMIMError: one cannot be removed.
    """
    for path in sorted(paths, key=lambda path: path.name not in MARKS):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise file_error(f"cannot remove {path}", error) from error


class NoLocks(ConfigError):
    """A file system on which processes cannot exclude each other."""


def try_hold(path: Path, option: str = "--out") -> int | None:
    """Take the lock of a file, created if missing; it ends with this process. None: another process holds it.

    Returns:
        What :func:`let_go` takes.

    Raises:
        ConfigError: the file cannot be written.
        NoLocks: its file system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NoLocks(f"{path} cannot be locked", str(error), "give each process its part: --part 1/4") from error
    for _ in range(40):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except FileNotFoundError:  # the folder was removed meanwhile by a process that has ended
            continue
        except OSError as error:
            why = str(error.strerror or error)
            raise ConfigError(f"cannot write {path}", why, f"choose another {option}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                _held.add(lock)
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:  # its owner removed it meanwhile
            pass
        except OSError as error:
            os.close(lock)
            why, fix = (
                str(error.strerror or error),
                f"choose another {option}, or give each process its part: --part 1/4",
            )
            raise NoLocks(f"{path} cannot be locked", why, fix) from error
        os.close(lock)
    return None


_held: set[int] = set()  # file descriptors of locks


def _close_locks() -> None:
    """In a forked child (a data worker): it must not keep a lock that its killed parent held."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def _take(out: Path, option: str) -> tuple[int, str]:
    """Create the folder and take its lock; its file descriptor, and what a killed process left in it.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    path, patience = out / LOCK, 40
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not out.is_symlink() and patience > 0:
                patience -= 1
                continue  # removed meanwhile by a process that has ended
            verb = "write to" if out.is_dir() else "create"
            why = str(error.strerror or error)
            raise ConfigError(f"cannot {verb} the folder {out}", why, f"choose another {option}") from error
        left = os.read(lock, 200).decode("utf-8", "replace").rstrip()
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            owner = re.match(r"(\d+) (\S+)", left)
            if owner and owner[2] == HOST and _started(int(owner[1])) == float("inf") and patience > 0:
                patience -= 1  # killed this moment: a child it had just forked has not closed the lock yet
                time.sleep(0.05)
                continue
            who = f"process {owner[1]} on {owner[2]}" if owner else "another process"
            raise ConfigError(
                f"{out} is in use", f"{who} is writing to it", f"wait for it or stop it, or choose another {option}"
            ) from None
        except (ImportError, OSError) as error:  # not on this system, or not on this file system
            say(f"note: {out} cannot be locked ({error}): run no other command on it meanwhile")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        os.close(lock)  # its owner removed it meanwhile
    _held.add(lock)
    _sign(lock, new=left.endswith(" new"))
    return lock, left


def let_go(path: Path, lock: int, made: Iterable[Path] = ()) -> None:
    """Remove a lock's file while it is held (who opened it meanwhile sees that it is gone), then let go of it.

    Of the folders that were made for it, those that are still empty are removed.
    """
    if lock not in _held:  # a forked child
        return
    for remove in (path.unlink, *(folder.rmdir for folder in made)):
        with contextlib.suppress(OSError):
            remove()
    _held.discard(lock)
    os.close(lock)


def _sign(lock: int, *, new: bool) -> None:
    """Write this process's name into its lock.

    Raises:
        TinyMIMError: the disk is full.
    """
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {HOST}{' new' * new}\n".encode(), 0)
    except OSError as error:
        raise file_error("cannot write the lock of the run folder", error) from error
