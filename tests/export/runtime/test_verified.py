"""A file's claim to be verified is held to its hashes, wherever it is printed or used, and without onnx."""

import json

import numpy as np
import pytest
from onnx import numpy_helper
from PIL import Image

from tests.export.tiny import META, segmentor_proto, write_labelled
from tinymim import cli
from tinymim_export import bench
from tinymim_export.precision.float_file import FloatFile
from tinymim_export.report.artifacts import onnx_file
from tinymim_export.runtime.engines import open_engine
from tinymim_export.runtime.metadata import (
    check_verified,
    file_graph_sha256,
    graph_sha256,
    load_proto,
    mark,
    proto_metadata,
    save_proto,
    write_metadata,
)
from tinymim_export.runtime.wire import NotProtobuf, fields, wire_field
from tinymim_export.web.build import web_contract


def verified_file(path):
    proto = segmentor_proto(free=True)
    write_metadata(proto, {"resize": META["resize"] | {"scale": [96, 64]}})
    mark(proto, {"graph_sha256": graph_sha256(proto)})
    save_proto(proto, path)
    return proto


def changed(path, how):
    """The file with another weight, contract, hash-less claim or none."""
    proto = verified_file(path)
    if how == "weight":
        tensor = proto.graph.initializer[0]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif how == "contract":
        write_metadata(proto, {"mean": [0.0, 0.0, 0.0]})
    elif how == "no hash":
        write_metadata(proto, {"parity": {"cosine": 1.0}})
    elif how == "not verified":
        write_metadata(proto, {"verified": False})
    elif how == "another's metadata":
        proto.metadata_props.add(key="author", value="somebody")  # says nothing of photos
    save_proto(proto, path)
    return proto


@pytest.mark.parametrize(
    ("how", "holds"),
    [
        ("nothing", True),
        ("another's metadata", True),
        ("weight", False),
        ("contract", False),
        ("not verified", False),
        ("no hash", None),
    ],
)
def test_what_a_claim_is_held_to(how, holds, tmp_path, capsys):
    path = tmp_path / "file.onnx"
    proto = changed(path, how)
    assert file_graph_sha256(path) == graph_sha256(proto)
    assert check_verified(path, proto_metadata(proto)) is holds
    assert open_engine(path).verified is holds
    assert onnx_file(path).verified is holds
    assert FloatFile(path).verified is (holds is True)
    about = web_contract(open_engine(path))["about"][0]
    assert about.endswith("not verified") is (holds is not True)
    data, photo = write_labelled(tmp_path / "data", 1, 2), tmp_path / "photo.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(photo)
    doubt = {False: "was changed since", None: "holds no hash", True: None}[holds] if how != "not verified" else None
    for verb in (
        ["predict", str(path), str(photo), "--out", str(tmp_path / "m.png")],
        ["eval", str(path), "--data", str(data)],
    ):
        assert cli.main(verb) == 0
        out = capsys.readouterr().out
        assert ("claims to be verified" in out) is (doubt is not None)
        assert doubt is None or doubt in out
    if how not in ("weight", "no hash"):
        return  # a bench takes a second
    result = bench(path, runs=10, threads=1)
    assert json.loads(result.to_json())["rows"][0]["verified"] is holds
    assert [doubt in text for text in result.remarks()] == [True] * (doubt is not None)


def test_the_hash_reads_what_protobuf_writes(exported):
    for made in vars(exported).values():
        assert file_graph_sha256(made.onnx) == graph_sha256(load_proto(made.onnx))
        assert check_verified(made.onnx, proto_metadata(load_proto(made.onnx))) is True


def test_fields_of_a_message():
    message = wire_field(1, 300) + wire_field(2, "text") + wire_field(15, b"\x00" * 200) + b"\x35abcd"
    assert list(fields(message)) == [(1, 300), (2, b"text"), (15, b"\x00" * 200), (6, b"abcd")]
    for end in (1, 4, len(message) - 1):
        with pytest.raises(NotProtobuf):
            list(fields(message[:end]))
