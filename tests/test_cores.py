"""Cores that a process may use: affinity, container quotas of both versions, OMP_NUM_THREADS."""

import pytest

from tinymim import cores
from tinymim.cores import core_limits
from tinymim.errors import CheckpointError
from tinymim.files import environment


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Eight cores, no quota; returns a function that writes the files of control groups."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "SELF", tmp_path / "self")

    def write(files, group=""):
        (tmp_path / "self").write_text(group)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


V1 = "4:cpu,cpuacct:/docker/a\n3:memory:/docker/a\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("files", "group", "wanted"),
    [
        ({}, "", 8),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 2),
        ({"cpu.max": "5000 100000\n"}, "0::/\n", 1),
        ({"cpu.max": "max 100000\n"}, "0::/\n", 8),
        ({"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 3),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "", 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "", 8),
        ({f"cpu,cpuacct/docker/a/cpu.cfs_{x}_us": y for x, y in (("quota", "50000"), ("period", "25000"))}, V1, 2),
        ({"cpu.max": "9900000 100000"}, "0::/\n", 8),
        *(({"cpu.max": odd}, "0::/\n", 8) for odd in ("", "x y", "1 0", "nan 1", "inf 1", "-3 2", "1 2 3", b"\xff\0")),
        ({"cpu.max/file": ""}, "0::/../../x\nnonsense\n", 8),
    ],
)
def test_quotas(machine, files, group, wanted):
    machine(files, group)
    assert cores.cores() == wanted
    assert environment()["cores"] == wanted


@pytest.mark.parametrize(("text", "wanted"), [("3", 3), ("2,1", 2), ("99", 8), ("0", 8), ("-1", 8), ("x", 8), ("", 8)])
def test_omp_num_threads(machine, monkeypatch, text, wanted):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cores.cores() == wanted


def test_every_limit_is_named(machine, monkeypatch):
    machine({"cpu.max": "250000 100000"}, "0::/")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert core_limits() == {"affinity": 8, "cgroup": 2.5, "OMP_NUM_THREADS": 4}


def test_training_and_export_keep_to_the_quota(machine):
    import torch

    from tinymim.compat import use_device
    from tinymim_export.graph.torch_model import load_torch_model

    def export():
        with pytest.raises(CheckpointError):
            load_torch_model("no_such.pth")

    before = torch.get_num_threads()
    machine({"cpu.max": "150000 100000"}, "0::/")
    try:
        for begin in (lambda: use_device("cpu"), export):
            torch.set_num_threads(4)
            begin()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "group", "wanted"),
    [
        ({}, "", 1 << 40),
        ({"memory.max": "5000\n", "memory.current": "3000\n"}, "0::/\n", 2000),
        (
            {"memory.max": "5000", "memory.current": "3000", "memory.stat": "anon 7\ninactive_file 900\nx\n"},
            "0::/\n",
            2900,
        ),
        ({"memory.max": "max", "a/memory.max": "500", "a/memory.current": "700"}, "0::/a/b\n", 0),
        ({f"memory/docker/a/memory.{x}_in_bytes": y for x, y in (("limit", "900"), ("usage", "100"))}, V1, 800),
        ({"memory.max": "5000", "memory.current": "x"}, "0::/\n", 1 << 40),
    ],
)
def test_free_memory(machine, monkeypatch, files, group, wanted):
    machine(files, group)
    read = cores._read
    there = f"MemAvailable: {1 << 30} kB"
    monkeypatch.setattr(cores, "_read", lambda path: there if path.name == "meminfo" else read(path))
    assert cores.free_memory() == wanted
