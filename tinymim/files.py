"""Files that are complete or absent: atomic writes, hashes, run folders, the machine record. Standard library only."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tinymim.cores import cores
from tinymim.errors import ConfigError, TinyMIMError, did_you_mean
from tinymim.hub import hub_name

PACKAGES = (
    "tinymim",
    "torch",
    "torchvision",
    "timm",
    "mmengine",
    "mmcv-lite",
    "mmcv",
    "mmsegmentation",
    "numpy",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)

HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node().split(".")[0])[:30] or "localhost"
_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "free some space or choose another folder, then run the command again",
    (errno.EROFS, errno.EACCES, errno.EPERM): "choose a folder you may write to, or change its permissions",
    (errno.ENOENT, errno.ENOTDIR): "check that the folder is still there, then run the command again",
}


def file_error(what: str, error: OSError) -> TinyMIMError:
    """Our own error for one of the operating system: why, and a remedy that fits its number."""
    fix = next((text for numbers, text in _REMEDIES.items() if error.errno in numbers), "")
    return TinyMIMError(what, str(error.strerror or error), fix or "check the disk, then run the command again")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` if the block succeeds, else remove it.

    The bytes are on the disk before the name is: after a power cut, too, a file is whole or absent, and of two files
    written one after the other the second never exists without the first.

    Raises:
        TinyMIMError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{HOST}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        known = file_error(f"cannot write {path}", error)
        raise TinyMIMError(known.what, f"{known.why} (no partial file is left)", known.fix) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder next to ``path``; rename it to ``path`` if the block succeeds, else remove it.

    Args:
        path: The folder to write.
        replace: Remove a folder that is there, once the new one is whole.

    Raises:
        TinyMIMError: something is at ``path``, the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and (replace or not any(path.iterdir()))):
        fix = "choose another folder" + (", or add --overwrite" if path.is_dir() else "")
        raise ConfigError(f"{path} exists", "it would be replaced", fix)
    part = path.with_name(f".{path.name}.{os.getpid()}.{HOST}.part")
    try:
        part.mkdir(parents=True)
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        known = file_error(f"cannot write {path}", error)
        raise TinyMIMError(known.what, f"{known.why} (no partial folder is left)", known.fix) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be writable and not readable
        return
    try:
        os.fsync(number)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):  # file systems without it
            raise
    finally:
        os.close(number)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; the folder is created if missing."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Write text, atomically; the folder is created if missing."""
    with atomic_path(path) as part:
        part.write_text(text, "utf-8", "backslashreplace")  # names of files may be no UTF-8


def own_configs() -> list[Path]:
    """The folders of mmseg_configs, as installed."""
    spec = importlib.util.find_spec("tinymim_mmseg_configs")
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []


def config_file(name: str | os.PathLike[str]) -> Path:
    """The file of an MMSegmentation config: a path, or the name of one of mmseg_configs ("upernet_tinymim_b").

    Raises:
        ConfigError: no such file.
    """
    folders = own_configs()
    path = Path(name)
    for found in (path, *(folder / f"{path.name.removesuffix('.py')}.py" for folder in folders)):
        if found.is_file():
            return found
    names = sorted({p.stem for folder in folders for p in folder.glob("[!_]*.py")})
    why = f"it is neither a file nor one of {', '.join(names)}"
    fix = did_you_mean(path.name.removesuffix(".py"), names, "use a path or one of these", str)
    raise ConfigError(f"no config {name}", why, fix)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes.

    Raises:
        TinyMIMError: it cannot be read, or is a folder.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TinyMIMError(
            f"cannot read {path}", error.strerror or str(error), "give a file that can be read"
        ) from None


def writable(name: str) -> str:
    """A file's name, or text with one in it, as UTF-8; bytes that are not are written out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def input_name(path: str | os.PathLike[str]) -> str:
    """How records name a file: without its folders; one of the Hugging Face hub as ``OWNER/NAME@COMMIT``."""
    return hub_name(path) or writable(Path(path).name)


def describe_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Name and sha256 of a file, as recorded in ``env.json`` for the inputs of a run."""
    return {"file": input_name(path), "sha256": sha256_file(path)}


def describe_files(
    folder: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]],
    size: Callable[[str | os.PathLike[str]], int] = os.path.getsize,
) -> dict[str, Any]:
    """A dataset in three values: the folder's name, the number of files, and a hash of their relative names and sizes.

    Hashing the content of every photo would take longer than many runs; so a photo that is replaced by another of the
    same size in bytes is not noticed.

    Args:
        folder: The folder.
        paths: The files.
        size: Bytes of a file; :func:`tinymim.data.shards.file_bytes` also knows those in shards.
    """
    lines = sorted(f"{os.path.relpath(path, folder)}\t{size(path)}\n".replace(os.sep, "/") for path in paths)
    digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return {"folder": writable(Path(folder).resolve().name), "files": len(lines), "list_sha256": digest}


def write_env(folder: str | Path, inputs: dict[str, Any]) -> None:
    """Write ``env.json`` of a run folder: machine, inputs of the run, and (later) its outputs.

    If the machine or an input has changed, a resumed run keeps the former record under "earlier"; an input that is
    None was not given again and keeps its value.

    Args:
        folder: The run folder.
        inputs: Plain values: :func:`describe_file`, :func:`describe_files`, hashes, None.
    """
    path, stamp = Path(folder) / "env.json", environment()
    before = json.loads(path.read_text("utf-8-sig")) if path.is_file() else {}
    old = before.get("inputs", {})
    value = stamp | {"inputs": {key: old.get(key) if given is None else given for key, given in inputs.items()}}
    past = {key: item for key, item in before.items() if key not in ("outputs", "earlier")}
    earlier = [*before.get("earlier", []), *([past] if past and past != value else [])]
    write_json(path, value | {"outputs": before.get("outputs", {})} | ({"earlier": earlier} if earlier else {}))


def note_output(folder: str | Path, name: str, *, known: bool = True) -> None:
    """Record the sha256 of a file a run just wrote under "outputs" in its ``env.json``; ``known=False``: drop it."""
    path = Path(folder) / "env.json"
    value = json.loads(path.read_text("utf-8-sig")) if path.is_file() else environment()
    outputs = {key: item for key, item in value.get("outputs", {}).items() if key != name}
    write_json(path, value | {"outputs": outputs | ({name: sha256_file(Path(folder) / name)} if known else {})})


@contextlib.contextmanager
def noted_output(folder: str | Path, name: str) -> Iterator[None]:
    """Write a product of a run inside the block: ``env.json`` then has its sha256, and never that of another file."""
    if (Path(folder) / name).exists():
        note_output(folder, name, known=False)  # a kill may come between the two files
    yield
    note_output(folder, name)


def drop_output(folder: str | Path, name: str) -> None:
    """Remove a product of a run, and its sha256 from ``env.json``."""
    if (path := Path(folder) / name).exists():
        note_output(folder, name, known=False)
        path.unlink()


def versions() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES` and of Python, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """The machine and its software versions, as recorded in ``env.json`` and in every result."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8-sig").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": cores(),
        "versions": versions(),
    }
