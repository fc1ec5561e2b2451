"""Configs inside files: what is data is read back, and nothing else is."""

import math

import pytest

from tinymim.errors import ConfigError
from tinymim.literals import LENGTH, not_literal, read_literal_file, read_literals


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1e-6", -1e-6),
        ("dict(type='BN', eps=1e-5, sides=(1, 2), more=[dict(a=None)])", None),
        ("{'a': True, -3: [], None: ()}", {"a": True, -3: [], None: ()}),
        ("inf", math.inf),
        ("'\\udcff\\N{BULLET}\\x00'", "\udcff\N{BULLET}\x00"),
        ("'a' 'b'", "ab"),
    ],
)
def test_data_is_read_back(text, value):
    value = dict(type="BN", eps=1e-5, sides=(1, 2), more=[dict(a=None)]) if value is None else value
    assert read_literals(f'"""A docstring."""\n# a comment\nx = {text}\n', "FILE") == {"x": value}
    assert read_literals(f"x = {value!r}", "FILE") == {"x": value}


def test_names_of_earlier_lines_are_copied():
    found = read_literals("a = dict(x=[1])\nb = dict(y=a, z=(a, a))\na = 2\n", "FILE")
    assert found == {"a": 2, "b": {"y": {"x": [1]}, "z": ({"x": [1]}, {"x": [1]})}}
    assert found["b"]["y"] is not found["b"]["z"][0]


HOSTILE = (
    "a = [0, 0]\n" + "".join(f"a = [{', '.join(['a'] * 10)}]\n" for _ in range(40)),
    "import os",
    "x = __import__('os').system('true')",
    "x = 1 + 1",
    "x = y",
    "x = f'{y}'",
    "x = b'bytes'",
    "x = ...",
    "x = lambda: 1",
    "x = [i for i in (1,)]",
    "x = [*y]",
    "x = {**y}",
    "x = dict(**y)",
    "x = dict([(1, 2)])",
    "x = list()",
    "x = {print(): 1}",
    "x = -'text'",
    "x.y = 1",
    "x, y = 1, 2",
    "x = y = 1",
    "del x",
    "with read_base():\n    from a import *",
    "def f(): pass",
    "print()",
    "x = (",
    "x = '\\N'",
    "x = \x00",
    "x = " + "[" * 65 + "]" * 65,
    "x = " + "[" * 50_000,
    "x = " + "-" * 50_000 + "1",
    "x = " + "1+" * 20_000 + "1",
    "x = " + "9" * 5000,
    "#" * (LENGTH + 1),
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:24])
def test_nothing_else_is(text):
    with pytest.raises(ConfigError, match=r"config in FILE is not plain data\n  why: .*(line \d|parsed|characters)"):
        read_literals(f"a = 1\n{text}\n", "FILE")


def test_files(tmp_path):
    for content, words in ((b"\xef\xbb\xbfx = 'y'", None), (b"x = '\xff'", "utf-8"), (None, "No such file")):
        path = tmp_path / "config.py"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        if words is None:
            assert read_literal_file(path) == {"x": "y"}
        else:
            with pytest.raises(ConfigError, match=words):
                read_literal_file(path)


def test_what_is_no_data_is_named():
    value = dict(a=[1, (2.0, "x", {"b": print})], c={1, 2}, d=dict(e=None), f={(1, 2): 3})
    assert [name for name, _ in not_literal(value)] == ["a.1.2.b", "c", "f.(1, 2)"]
