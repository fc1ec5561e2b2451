"""Open files of weights: nothing in a file is ever executed, and none takes more memory than it has bytes.

Formats are told by content, not by name: PyTorch's zip and its legacy pickles, and safetensors; others are refused by
name. Pickles load with ``weights_only=True``; every object in them that is no plain value or tensor becomes inert.
"""

import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.errors import CheckpointError, DataError
from tinymim.hub import fetch, is_hub
from tinymim.schema import parse

STAND_IN = "inert"  # the module that stand-ins say they are of
OBJECTS = 64  # kinds of unknown objects in one pickle: each costs another pass over the file
AGAIN = "download or copy it again and compare its size and sha256 with the source"
SAVE = "give a .pth of tensors (torch.save(model.state_dict(), ...)) or a .safetensors file"
FOREIGN = (  # first bytes, or the end of the name; what the file is; what to do
    ((b"version https://git-lfs",), "a Git LFS pointer, without the weights", "fetch the file itself: git lfs pull"),
    ((b"<", b"{\n", b'{"'), "a text, perhaps an error page of a download", AGAIN),
    ((b"\x89HDF",), "an HDF5 file of Keras", SAVE),
    ((b"GGUF",), "a GGUF file", SAVE),
    ((b"\x93NUMPY", ".npz"), "a NumPy archive (JAX weights)", f"convert it with timm: {SAVE}"),
    ((".onnx",), "an ONNX model", "give the checkpoint that it was exported from (student.pth, segmentor.pth)"),
)
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # how Hugging Face calls the weights of a model


class Inert(dict):
    """Stands in for any pickled object of a file; accepts everything, keeps its plain attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return self


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file of weights that a name stands for: wherever a checkpoint is wanted, a name goes through here.

    Args:
        path: The file; a folder as Hugging Face writes it; or ``hf-hub:OWNER/NAME[@REVISION]``, which is fetched.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
        ConfigError: no name of the hub.
    """
    path = fetch(str(path)) if is_hub(path) else Path(path)
    try:
        if path.is_file():
            return path
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        others = sorted(p.name for p in path.iterdir()) if path.is_dir() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}", str(error), "check the path and its permissions") from None
    if found:
        return found[0]
    if others is None:
        raise CheckpointError(f"no checkpoint at {path}", "the file does not exist", "check the path")
    if sharded := [name for name in others if name.endswith(".index.json")]:
        raise CheckpointError(
            f"the weights in {path} are spread over several files",
            f"{sharded[0]} lists them",
            'save them in one: model.save_pretrained(FOLDER, max_shard_size="100GB")',
        )
    near = next((name for name in others if name.endswith((".pth", ".safetensors", ".bin"))), None)
    raise CheckpointError(
        f"{path} is a folder",
        f"it holds none of {', '.join(IN_FOLDER)}",
        f"give the file: {path / near}" if near else "give a file of weights",
    )


def open_weights(path: Path) -> tuple[Any, dict[str, Any]]:
    """The content of a file (tensors in dictionaries and lists), and the metadata that our .safetensors store.

    Raises:
        CheckpointError: damaged, not a file of weights, or one that claims more bytes than it has.
    """
    try:
        with open(path, "rb") as file:
            start, size = file.read(32), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", str(error), "check the path and its permissions") from None
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path)
    for marks, what, fix in FOREIGN:
        if any(start.startswith(m) if isinstance(m, bytes) else path.name.endswith(m) for m in marks):
            raise CheckpointError(f"{path} holds no weights that can be read", f"it is {what}", fix)
    return torch_load(path), {}


def open_described(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file of ours, a .pth or a .safetensors; of any other both may be empty.

    Args:
        path: See :func:`weights_file`.

    Raises:
        CheckpointError: see :func:`weights_file` and :func:`open_weights`.
    """
    content, meta = open_weights(weights_file(path))
    if not meta and isinstance(content, dict):  # not our .safetensors
        found = content.get("meta")
        meta = dict(found) if isinstance(found, dict) else {}
        content = content.get("state_dict") or content.get("model")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}, meta


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    words = error if isinstance(error, str) else f"{type(error).__name__}: {str(error)[:160]}"
    return CheckpointError(f"cannot read {path}", f"the file is damaged or not a checkpoint ({words})", AGAIN)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
            meta = parse((file.metadata() or {}).get("tinymim", "{}"), dict[str, Any], f"the metadata of {path}")
    except DataError as error:
        raise CheckpointError(error.what, error.why, AGAIN) from None
    except Exception as error:  # a parser of foreign bytes
        raise _damaged(path, error) from error
    return content, meta


def torch_load(path: Path) -> Any:
    """``torch.load`` with ``weights_only=True``; every global it would refuse becomes an :class:`Inert`, or a plain
    dictionary or list where the pickle fills it as one (a configuration of yacs).

    Raises:
        CheckpointError: see :func:`open_weights`.
    """
    _check_container(path)
    unsafe: set[str] = set()
    filled: dict[str, type] = {}
    while True:
        # torch's message leaves "builtins." out, its table of allowed names does not
        names = unsafe | {f"builtins.{name}" for name in unsafe if "." not in name}
        stand_ins = [(_stand_in(name, filled.get(name)), name) for name in sorted(names)]
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                content = torch.load(path, map_location="cpu", weights_only=True)
            _check_bytes(content, path)
            return content
        except pickle.UnpicklingError as error:
            fills = re.search(rf"(SETITEMS?|lists).* but got <class '{STAND_IN}\.([\w.]+)'>", str(error))
            if fills and fills[2] not in filled:
                filled[fills[2]] = list if fills[1] == "lists" else OrderedDict
                continue
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None or found[1] in unsafe or len(unsafe) == OBJECTS:
                raise CheckpointError(
                    f"cannot read {path}",
                    "it is not a checkpoint of tensors" + (f" (it holds {found[1]})" if found else ""),
                    SAVE,
                ) from error
            unsafe.add(found[1])
        except CheckpointError:
            raise
        except Exception as error:  # a parser of foreign bytes
            raise _damaged(path, error) from error


def _stand_in(name: str, plain: type | None) -> type:
    """A class for the objects of another one: each is an :class:`Inert`, or an empty object of a plain type."""
    body: dict[str, Any] = {"__module__": STAND_IN}
    if plain is not None:
        body["__new__"] = lambda cls, *args, **kwargs: plain()
    return type(name, (Inert,), body)


def _check_container(path: Path) -> None:
    """Refuse archives of other programs, packed archives, and pickles that allocate by themselves."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise _damaged(path, "it is empty")
        if file.read(4) != b"PK\x03\x04":
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                allocates = text.find(b"bytearray") >= 0
        else:
            try:
                with zipfile.ZipFile(file) as archive:
                    parts = {Path(entry.filename).name: entry for entry in archive.infolist()}
                    if "constants.pkl" in parts:
                        raise CheckpointError(
                            f"{path} is a TorchScript archive", "it is a program, which is never run here", SAVE
                        )
                    if any(name.endswith(".npy") for name in parts):
                        raise CheckpointError(f"{path} is a NumPy archive", "PyTorch cannot read it", SAVE)
                    if (claimed := sum(entry.file_size for entry in archive.infolist())) > size:
                        raise _damaged(path, f"it claims {claimed:,} bytes, the file has {size:,}")
                    allocates = "data.pkl" in parts and b"bytearray" in archive.read(parts["data.pkl"])
            except CheckpointError:
                raise
            except Exception as error:  # a parser of foreign bytes
                raise _damaged(path, error) from error
    if allocates:  # bytearray(10**12) is the one call of a plain pickle that takes memory
        raise CheckpointError(f"cannot read {path}", "it is not a checkpoint of tensors (it holds a bytearray)", SAVE)


def _check_bytes(content: Any, path: Path) -> None:
    """The tensors of a file together are no larger than the file, each no larger than what it points to."""
    storages: dict[int, int] = {}
    for _, key, value in walk(content):
        if value.layout != torch.strided or value.device.type != "cpu":
            continue  # refused by name where it is used
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > storage.nbytes():
            raise _damaged(path, f"{key} claims more values than are stored")
    if (claimed := sum(storages.values())) > (size := path.stat().st_size):
        raise _damaged(path, f"its tensors claim {claimed:,} bytes, the file has {size:,}")


def walk(content: Any, depth: int = 5) -> list[tuple[str, str, Tensor]]:
    """Every tensor of nested dictionaries: (names of the dictionaries around it, each with a dot; its key; tensor)."""
    found: list[tuple[str, str, Tensor]] = []
    seen: set[int] = set()  # a pickle can hold a dictionary within itself

    def visit(value: dict[Any, Any], place: str, left: int) -> None:
        if id(value) in seen or isinstance(value, Inert):
            return
        seen.add(id(value))
        for key, item in value.items():
            if not isinstance(key, str):
                continue
            if isinstance(item, Tensor):
                found.append((place, key, item))
            elif isinstance(item, dict) and left:
                visit(item, f"{place}{key}.", left - 1)

    if isinstance(content, dict):
        visit(content, "", depth)
    return found
