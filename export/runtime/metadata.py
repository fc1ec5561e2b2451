"""The contract inside an .onnx file: ``metadata_props`` keys ``tinymim.*`` with JSON values.

Reading needs onnxruntime only; writing needs onnx.

Keys: part, classes, palette, mean, std (0-255 units of RGB), channel_order, stride (sides are padded to a multiple of
it, in pixels), resize, checkpoint_sha256, config_sha256, versions, cost, verified (true or false), parity (figures).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from tinymim.errors import DataError
from tinymim.files import atomic_path

PREFIX = "tinymim."


def decode(properties: dict[str, str]) -> dict[str, Any]:
    """``tinymim.*`` properties without the prefix, JSON decoded; keys of others are left out."""
    return {key.removeprefix(PREFIX): json.loads(text) for key, text in properties.items() if key.startswith(PREFIX)}


def read_metadata(session: Any) -> dict[str, Any]:
    """Metadata of an onnxruntime session."""
    return decode(session.get_modelmeta().custom_metadata_map)


def write_metadata(proto: Any, values: dict[str, Any]) -> None:
    """Set ``tinymim.*`` properties of an ONNX ModelProto; others stay."""
    old = {prop.key: prop.value for prop in proto.metadata_props}
    new = {PREFIX + key: json.dumps(value) for key, value in values.items()}
    del proto.metadata_props[:]
    for key, value in (old | new).items():
        proto.metadata_props.add(key=key, value=value)


def load_proto(path: str | Path) -> Any:
    """Read a .onnx file as ModelProto.

    Raises:
        DataError: missing, or no ONNX file.
    """
    import onnx

    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file at {path}", "it does not exist", "check the path")
    try:
        proto = onnx.load(str(path))
    except Exception as error:  # protobuf's own error classes vary with its version
        raise not_onnx(path, error) from error
    if not proto.graph.node:
        raise not_onnx(path, "it holds no graph")
    return proto


def proto_metadata(proto: Any) -> dict[str, Any]:
    """Metadata of a ModelProto."""
    return decode({prop.key: prop.value for prop in proto.metadata_props})


def precision_name(meta: dict[str, Any]) -> str:
    """The precision a file's metadata name; files that name none are FP32."""
    return str((meta.get("precision") or {}).get("name", "fp32"))


def save_proto(proto: Any, path: str | Path) -> None:
    """Write one .onnx file, atomically."""
    with atomic_path(path) as part:
        part.write_bytes(proto.SerializeToString(deterministic=True))


def graph_sha256(proto: Any) -> str:
    """Hash of graph and weights, metadata left out: what ``verified`` speaks of."""
    bare = type(proto)()
    bare.CopyFrom(proto)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def is_verified(proto: Any) -> bool:
    """Whether the file is marked as verified and its graph is still the one that was."""
    meta = proto_metadata(proto)
    recorded = (meta.get("parity") or {}).get("graph_sha256")
    return bool(meta.get("verified")) and recorded in (None, graph_sha256(proto))


def strip(proto: Any) -> None:
    """Remove stack traces, source paths and documentation from every node and tensor."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for item in (*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
            item.doc_string = ""
            del item.metadata_props[:]
        for node in graph.node:
            graphs += [a.g for a in node.attribute if a.HasField("g")]
    for function in proto.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]
    proto.doc_string = ""
    del proto.metadata_props[:]


def not_onnx(path: str | Path, error: object) -> DataError:
    """The error for a file that is damaged or something else."""
    if Path(path).suffix in (".pth", ".pt", ".safetensors"):
        fix = f"export it first: tinymim-export --checkpoint {path} --onnx {Path(path).with_suffix('.onnx')}"
        return DataError(f"{path} is not a usable .onnx file", "it is a checkpoint", fix)
    return DataError(
        f"{path} is not a usable .onnx file",
        f"damaged, incomplete or another format ({first_line(error)})",
        "export it again with tinymim-export, or copy it again and compare its sha256",
    )


def first_line(error: object, limit: int = 200) -> str:
    """The first line of an error's text, or the name of its class where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
