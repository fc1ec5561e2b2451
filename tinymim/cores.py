"""How many CPU cores this process may use: affinity, container quotas, OMP_NUM_THREADS. Standard library only."""

import math
import os
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
    if quotas := [quota for folder in _groups() if (quota := _quota(folder)) is not None]:
        limits["cgroup"] = min(quotas)
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads.isascii() and threads.isdigit() and 0 < len(threads) < 7 and int(threads) > 0:
        limits["OMP_NUM_THREADS"] = int(threads)
    return limits


def _groups() -> set[Path]:
    """Folders of this process's CPU group and of all groups above it."""
    found = {CGROUPS, CGROUPS / "cpu", CGROUPS / "cpu,cpuacct"}
    for line in _read(SELF).splitlines():  # "0::/a/b" (version 2), "4:cpu,cpuacct:/a/b" (version 1)
        _, _, rest = line.partition(":")
        names, _, inside = rest.partition(":")
        if names and "cpu" not in names.split(","):
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
