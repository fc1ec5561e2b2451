"""CPU cores and memory that this process may use, container quotas included. Standard library only."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def cores() -> int:
    """Whole cores that this process may use, at least 1: the smallest limit of :func:`core_limits`, rounded up."""
    return max(1, math.ceil(min(core_limits().values())))


def core_limits() -> dict[str, float]:
    """Every limit that is set: what sets it -> cores, more than 0.

    ``affinity`` (taskset, cpuset), else ``machine``; ``cgroup`` (a container's CPU quota, in fractions of a core, of
    version 2 or 1 and of every group above); ``OMP_NUM_THREADS``. What cannot be read is no limit.
    """
    if hasattr(os, "sched_getaffinity"):
        limits: dict[str, float] = {"affinity": len(os.sched_getaffinity(0))}
    else:
        limits = {"machine": os.cpu_count() or 1}
    if quotas := [quota for folder in _groups("cpu", "cpu,cpuacct") if (quota := _quota(folder)) is not None]:
        limits["cgroup"] = min(quotas)
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads.isascii() and threads.isdigit() and 0 < len(threads) < 7 and int(threads) > 0:
        limits["OMP_NUM_THREADS"] = int(threads)
    return limits


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has, or less where a container's limit leaves less."""
    numbers = _numbers(_read(Path("/proc/meminfo")))
    if (free := numbers.get("MemAvailable:", 0) << 10) == 0:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    for folder in _groups("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(ValueError):  # "max", or no such file
                most, used = int(_read(folder / limit)), int(_read(folder / usage))
                cached = _numbers(_read(folder / "memory.stat")).get("inactive_file", 0)  # given up when needed
                free = min(free, max(most - used + cached, 0))
    return free


def _numbers(text: str) -> dict[str, int]:
    """First word of a line -> the number after it."""
    rows = [words for line in text.splitlines() if len(words := line.split()) > 1 and words[1].isdecimal()]
    return {words[0]: int(words[1]) for words in rows}


def _groups(*kinds: str) -> set[Path]:
    """Folders of this process's groups of some kinds, their names in version 1, and of all groups above them."""
    found = {CGROUPS, *(CGROUPS / kind for kind in kinds)}
    for line in _read(SELF).splitlines():  # "0::/a/b" (version 2), "4:cpu,cpuacct:/a/b" (version 1)
        _, _, rest = line.partition(":")
        names, _, inside = rest.partition(":")
        if names and kinds[0] not in names.split(","):
            continue
        mount = CGROUPS / names if names else CGROUPS
        parts = [part for part in inside.split("/") if part and part != ".."]
        found |= {mount.joinpath(*parts[:count]) for count in range(len(parts) + 1)}
    return found


def _quota(folder: Path) -> float | None:
    """Cores of ``cpu.max`` (version 2) or ``cpu.cfs_quota_us`` (version 1); None: unlimited or unreadable."""
    text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    try:
        quota, period = (float(word) for word in text.split())
    except ValueError:  # "max 100000", or no such file
        return None
    cores = quota / period if period > 0 else 0.0
    return cores if 0 < cores < math.inf else None


def _read(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(2**16)
    except (OSError, ValueError):
        return ""
