"""Files that are whole or absent: atomic writes, hashes, run folders, the machine stamp. Standard library only."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError, TinyMIMError

PACKAGES = ("tinymim", "torch", "torchvision", "timm", "mmengine", "mmcv-lite", "mmcv", "mmsegmentation", "numpy",
            "pillow", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it into place if the block succeeds, remove it if not.

    Raises:
        TinyMIMError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise TinyMIMError(
            f"cannot write {path}",
            f"{error.strerror or error} (nothing was left behind)",
            "free some space or choose another --out, then run the command again",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_out(out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a run folder, refusing to mix two runs.

    Raises:
        ConfigError: the folder already holds files and neither ``resume`` nor ``overwrite`` was given, or ``resume``
            was given and there is nothing to resume.
    """
    out = Path(out)
    used = out.is_dir() and any(out.iterdir())
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "a run writes a folder", "choose another --out")
    if resume and not used:
        raise ConfigError(f"{out} holds no run to resume", "the folder is missing or empty", "leave --resume out")
    if used and overwrite:
        shutil.rmtree(out)
    elif used and not resume:
        free = next(name for i in range(2, 10_000) if not (name := out.with_name(f"{out.name}-{i}")).exists())
        raise ConfigError(
            f"{out} already holds a run",
            "two runs in one folder could not be told apart",
            f"add --resume to go on, --overwrite to start again, or --out {free}",
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """The machine and software stamp kept in ``env.json`` and in every result."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
    }
