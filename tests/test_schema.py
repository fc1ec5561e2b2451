"""What is read from a file is bounded and checked; the error names file, place and what was expected."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

import pytest

from tinymim.errors import DataError
from tinymim.records import Compare, Contract, Environment, read_env
from tinymim.schema import DEPTH, AnyNumber, Count, Limits, Share, check, parse, read_json, read_lines
from tinymim.study.records import CellResult, Renamings
from tinymim_export.report.lineage import Lineage

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Row(TypedDict, total=False):
    size: Required[int]
    pairs: list[tuple[float, float]] | None
    shares: dict[str, Share]
    kind: Literal["x", "y"]
    loss: AnyNumber
    side: Annotated[int, Limits(1, 9)]


@dataclass
class Box:
    name: str
    rows: list[Row]
    seen: bool = False


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"size": true}', "size is True, expected a whole number"),
        ('{"size": 1.5}', "size is 1.5, expected a whole number"),
        ('{"pairs": []}', "has no 'size'"),
        ('{"size": 1, "pairs": [[1, 2], [1]]}', "pairs[1] has 1 entries, expected 2"),
        ('{"size": 1, "pairs": 5}', "pairs is 5, expected a list or null"),
        ('{"size": 1, "shares": {"a": 2}}', "shares.a is 2, expected a number from 0 to 1"),
        ('{"size": 1, "shares": {"a": NaN}}', "shares.a is nan, expected a finite number"),
        ('{"size": 1, "side": 10}', "side is 10, expected a whole number from 1 to 9"),
        ('{"size": 1, "kind": "z"}', "kind is 'z', expected 'x' or 'y'"),
        ('{"size": 1, "size": 2}', "the key 'size' occurs twice"),
        ('{"size": ' + "9" * 300 + "}", "too large"),
        ('{"size": ' + "9" * 5000 + "}", "damaged, or no JSON"),
        ('{"size": 1, "more": "\\ud800"}', "more holds half a character"),
        ('{"size": 1, "more": ' + "[" * 40 + "]" * 40 + "}", "nested deeper"),
        ("[" * 100_000, f"nested deeper than {DEPTH} levels"),
        ("[]", "its content is a list, expected an object"),
        ("", "no JSON"),
    ],
)
def test_what_is_refused_and_where(text, why):
    with pytest.raises(DataError) as caught:
        parse(text, Row, "a.json")
    assert why in caught.value.why
    assert "a.json" in caught.value.what


def test_what_is_legal():
    text = '{"size": 1, "loss": NaN, "pairs": null, "unknown": {"a": [1, Infinity, "\\u20ac"]}}'
    assert parse(text, Row, "a.json")["unknown"]["a"][2] == "\u20ac"
    assert check({"name": "n", "rows": [{"size": 2}]}, Box, "a.json")["rows"][0]["size"] == 2
    with pytest.raises(DataError, match=r"rows\[1\].size is 'x'"):
        check({"name": "n", "rows": [{"size": 2}, {"size": "x"}]}, Box, "a.json")
    for counts, why in (([1, 2, -1, 3], r"\[2\] is -1"), ([1, 2**60], r"\[1\] is a number of"), ([1, "2"], r"\[1\]")):
        with pytest.raises(DataError, match=why):
            check(counts, list[Count], "a.json")


def test_a_value_that_refers_to_itself_ends(monkeypatch):
    """A pickle may hold what JSON cannot: a list in itself, and one that doubles at every level."""
    monkeypatch.setattr("tinymim.schema.VALUES", 10_000)
    ring: list[Any] = []
    ring.append(ring)
    twice: Any = "x"
    for _ in range(DEPTH - 2):
        twice = [twice, twice]
    for value, why in ((ring, "nested deeper"), (twice, "values")):
        with pytest.raises(DataError, match=why):
            check(value, Any, "a.pth")


def test_only_ordinary_files_of_a_sane_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    (tmp_path / "other").write_bytes('{"a": "\u20ac"}'.encode("utf-16"))
    for name, why in (("pipe", "no ordinary"), ("", "no ordinary"), ("dangling", "No such"), ("huge", "at most")):
        with pytest.raises(DataError, match=why):
            read_json(tmp_path / name)
    with pytest.raises(DataError, match="not UTF-8"):
        read_json(tmp_path / "other")
    (tmp_path / "bom").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "bom") == {"a": 1}


def test_lines_that_a_killed_run_leaves(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": NaN}\n\0\0\0\n[1]\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for record in read_lines(path)] == [1, 2]
    assert "2 damaged line(s)" in capsys.readouterr().out
    path.write_bytes(b"\x80\x02junk\n")
    with pytest.raises(DataError, match="none of its lines"):
        list(read_lines(path))
    path.write_bytes(b"")
    assert not list(read_lines(path))


def test_what_older_commits_wrote_still_reads(shared, tmp_path):
    cells = sorted(DOCS.glob("studies/*/cells/*/*.json"))
    assert len(cells) > 50
    for path in cells[::5]:
        read_json(path, CellResult)
    for path in DOCS.glob("studies/*/renamed.json"):
        read_json(path, Renamings)
    assert read_json(DOCS / "compare.json", Compare)["measure"]["rows"]
    Lineage.from_dict(read_json(DOCS.parent / "lineage.json", Lineage))
    assert read_env(tmp_path) == {}
    # before 2026-12, one teacher was no list
    check({"inputs": {"teacher": {"file": "a.pth", "sha256": "0"}, "data": None}, "cores": 2}, Environment, "env.json")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("cost", {"size": ["<script>", "b"]}, "cost.size[0] is '<script>'"),
        ("std", [0.0, 1.0, 1.0], "std[0] is 0.0"),
        ("mean", ["a", 1, 1], "mean[0] is 'a'"),
        ("classes", "sky", "classes is 'sky', expected a list"),
        ("palette", [[1, 2]], "palette[0] is a list, expected"),
        ("resize", {"scale": [10**9, 3]}, "resize.scale[0] is 1000000000"),
        ("verified", "yes", "verified is 'yes', expected true or false"),
    ],
)
def test_metadata_of_an_onnx_file(key, value, why):
    from tinymim_export.runtime.metadata import decode

    properties = {"tinymim.part": '"segmentor"', f"tinymim.{key}": json.dumps(value)}
    with pytest.raises(DataError) as caught:
        decode(properties, "a.onnx")
    assert why in caught.value.why
    assert "a.onnx" in caught.value.what
    notes: list[str] = []
    assert decode(properties, "a.onnx", notes) == {"part": "segmentor"}  # a report goes on without it
    assert why in notes[0]
    check({"part": "segmentor", "std": [1.0] * 3, "resize": {"scale": [3, 3], "pad": None}}, Contract, "a.onnx")
