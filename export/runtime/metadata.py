"""The contract inside an .onnx file: ``metadata_props`` keys ``tinymim.*`` with JSON values.

Reading needs onnxruntime only; writing needs onnx.

Keys: part, classes, palette, mean, std (0-255 units of RGB), channel_order, stride (sides are padded to a multiple of
it, in pixels), resize, tracker (sizes and factors of its crops), checkpoint_sha256, config_sha256, versions, cost,
verified (true or false), parity (figures).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymim.errors import DataError
from tinymim.files import atomic_path
from tinymim.records import Contract
from tinymim.schema import check, parse
from tinymim_export.runtime.wire import NotProtobuf, spans

PREFIX = "tinymim."
METADATA_PROPS = 14  # field of ModelProto
CONTRACT = ("part", "classes", "palette", "mean", "std", "channel_order", "resize", "input")


def decode(
    properties: Mapping[str, str], source: str = "the .onnx file", notes: list[str] | None = None
) -> dict[str, Any]:
    """``tinymim.*`` properties without the prefix, JSON decoded and checked; keys of others are left out.

    Args:
        properties: Key -> text.
        source: The file, for the error.
        notes: Given: a value that is not right is left out, and said here.

    Raises:
        DataError: a value that is no JSON, or not what :class:`tinymim.records.Contract` says.
    """
    fix = "export it again with tinymim-export, or use a copy that was not edited"
    found: dict[str, Any] = {}
    for key, text in properties.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            try:
                value = {name: parse(text, Any, f"{key} of {source}", fix=fix)}
                found |= check(value, Contract, f"the metadata of {source}", fix=fix)
            except DataError as error:
                if notes is None:
                    raise
                notes.append(f"{key} was left out: {error.why}")
    return found


def read_metadata(session: Any, source: str = "the .onnx file", notes: list[str] | None = None) -> dict[str, Any]:
    """Metadata of an onnxruntime session; see :func:`decode`."""
    return decode(session.get_modelmeta().custom_metadata_map, source, notes)


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
    """Metadata of a ModelProto.

    Raises:
        DataError: see :func:`decode`.
    """
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


def mark(proto: Any, summary: dict[str, Any], verified: bool = True) -> None:
    """Write the result of a verification, with the hashes that :func:`check_verified` holds the file to."""
    parity = summary | {"contract_sha256": contract_sha256(proto_metadata(proto))}
    write_metadata(proto, {"verified": verified, "parity": parity})


def contract_sha256(meta: dict[str, Any]) -> str:
    """Hash of what the metadata say of photos and classes: with the graph it decides every mask."""
    said = {name: meta.get(name) for name in CONTRACT} | {name: meta[name] for name in ("tracker",) if name in meta}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_graph_sha256(path: str | Path) -> str:
    """:func:`graph_sha256` of a file, read piece by piece and without onnx.

    Raises:
        DataError: it is no protobuf file.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for number, start, end in spans(file, Path(path).stat().st_size):
                if number == METADATA_PROPS:
                    continue
                file.seek(start)
                while start < end:
                    piece = file.read(min(1 << 20, end - start))
                    if not piece:
                        raise NotProtobuf("it became shorter while it was read")
                    digest.update(piece)
                    start += len(piece)
    except (OSError, NotProtobuf) as error:
        raise not_onnx(path, error) from error
    return digest.hexdigest()


def check_verified(path: str | Path, metadata: dict[str, Any]) -> bool | None:
    """Whether a file's claim to be verified holds: its graph, weights and contract are those that were. Needs no onnx.

    Args:
        path: The .onnx file.
        metadata: Its ``tinymim.*`` metadata.

    Returns:
        True: verified. False: it does not claim to be, or was changed since. None: it claims to be, but holds no hash
        to check that by (files of others, or from before there was one).
    """
    if metadata.get("verified") is not True:
        return False if "verified" in metadata else None
    parity = metadata.get("parity")
    parity = parity if isinstance(parity, dict) else {}
    recorded, said = parity.get("graph_sha256"), parity.get("contract_sha256")
    if not isinstance(recorded, str):
        return None
    if said is not None and said != contract_sha256(metadata):
        return False
    return recorded == file_graph_sha256(path)


def verified_note(path: str | Path, metadata: dict[str, Any], holds: bool | None) -> str | None:
    """A sentence where a file claims to be verified and :func:`check_verified` gave another answer (``holds``)."""
    if metadata.get("verified") is not True or holds:
        return None
    if holds is None:
        return f"{Path(path).name} claims to be verified, and holds no hash to check that by"
    return (
        f"{Path(path).name} claims to be verified, but was changed since (its graph, weights or contract have another "
        "hash): verify it again (tinymim-export --verify-only), or get the file again"
    )


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
