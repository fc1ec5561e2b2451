"""Tensor shapes and meta of a PyTorch or safetensors file, without PyTorch.

A ``.pth`` is a zip with a pickle of plain values inside. It is read here by an unpickler that builds dicts, lists,
numbers and text only: a tensor gives its shape, any other object an empty placeholder, and no code of the file runs.
"""

import collections
import contextlib
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, TypedDict

from tinymim.errors import DataError
from tinymim.records import Count
from tinymim.schema import check, parse

LARGEST_PICKLE = 64 * 2**20  # bytes, without tensors


class _Nothing(dict):
    """Stands for an object of a foreign file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...


class Shape(tuple):
    """A tensor that was not read."""


class Tensor(TypedDict, total=False):
    """An entry of a safetensors header."""

    shape: list[Count]


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: C's allocates what an opcode asks for
    """Plain values, shapes, and placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *rest: Shape(size)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        return _Nothing

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_weights(path: Path) -> tuple[dict[str, Shape], dict[str, Any]]:
    """Tensor shapes and meta (plain values only) of a ``.pth`` (PyTorch 1.6 or newer) or ``.safetensors`` file.

    Raises:
        DataError: damaged, or another format.
    """
    try:
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                text = file.read(min(length, LARGEST_PICKLE)).decode("utf-8")
            head = parse(text, dict[str, Tensor], str(path))
            stored = (head.pop("__metadata__", None) or {}).get("tinymim", "{}")
            meta = parse(stored, dict[str, Any], f"the metadata of {path}")
            return {name: Shape(about["shape"]) for name, about in head.items()}, meta
        with zipfile.ZipFile(path) as archive:
            inside = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if inside.file_size > LARGEST_PICKLE:
                raise ValueError(f"its index has {inside.file_size} bytes")
            with archive.open(inside) as file:
                content = _Reader(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"cannot read {path}",
            f"damaged, or no PyTorch file ({type(error).__name__}: {str(error)[:120]})",
            "copy it again and compare its sha256, or give the run folder, .onnx or result file instead",
        ) from error
    content = content if isinstance(content, dict) else {}
    found = content.get("meta")
    state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    shapes = {name: value for name, value in state.items() if isinstance(name, str) and _is_shape(value)}
    plain = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        with contextlib.suppress(DataError):  # an object of a foreign file
            plain[str(key)] = check(value, Any, str(path))
    return shapes, plain


def _is_shape(value: Any) -> bool:
    return isinstance(value, Shape) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**53 for n in value)
