"""The one way a stored value enters: JSON is read within bounds and checked against a shape. Standard library only.

A shape is a type hint: ``int``, ``float``, ``str``, ``bool``, ``None``, ``list[T]``, ``dict[str, T]``,
``tuple[T, T]``, ``Literal``, unions, ``Any`` (any JSON), ``Annotated[T, Limits(...)]``, ``Annotated[T, shape]`` (T is
what mypy sees, the shape what is checked), and a ``TypedDict`` or dataclass for an object of known keys
(:mod:`tinymim.records` has those of every file). Keys that a shape does not know are kept, as any JSON: files of other
versions stay readable. What is returned is the value itself, of built-in types only.
"""

import functools
import json
import math
import stat
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from tinymim.errors import DataError
from tinymim.progress import say

LARGEST = 32 * 2**20  # bytes of a JSON file, or of one value
LONGEST_LINE, LARGEST_LOG = 2**20, 2**30  # bytes of a line of metrics.jsonl, and of the file
DEPTH = 32  # objects and lists within each other
TEXT, VALUES = 2**20, 2**22  # characters of a text, values in all
WHOLE = 2**53  # largest whole number: what every reader of JSON agrees on
FIX = "write it again with the command that made it, or restore a copy"


@dataclass(frozen=True)
class Limits:
    """Limits of a number, or of the length of a text or list, for ``Annotated``.

    Attributes:
        low: Smallest value or length.
        high: Largest value or length.
        finite: Whether NaN and infinities are refused (they are wherever nothing else is said).
    """

    low: float = -math.inf
    high: float = math.inf
    finite: bool = True


Share = Annotated[float, Limits(0, 1.000001)]
Count = Annotated[int, Limits(0, WHOLE)]
AtLeast0 = Annotated[float, Limits(0)]
Above0 = Annotated[float, Limits(1e-12)]
AnyNumber = Annotated[float, Limits(finite=False)]  # NaN is legal: losses


def read_json(path: str | Path, shape: Any = Any, *, fix: str = FIX) -> Any:
    """A JSON file's value, checked.

    Args:
        path: UTF-8, with or without a byte order mark; at most :data:`LARGEST` bytes.
        shape: What it must be.
        fix: What the error says to do.

    Raises:
        DataError: no such file, no JSON, or another shape; the place is named ("rows[3].shape").
    """
    return parse(_text(Path(path), fix), shape, str(path), fix=fix)


def read_large_json(path: str | Path, largest: int, *, fix: str = FIX) -> Any:
    """The value of a JSON file of any size, whose reader checks each part of it that it uses.

    Args:
        path: UTF-8, with or without a byte order mark.
        largest: Bytes at most.
        fix: What the error says to do.

    Raises:
        DataError: no such file, larger, no JSON, or a key twice.
    """
    return _loads(_text(Path(path), fix, largest), str(path), fix)


def parse(text: str, shape: Any, source: str, *, fix: str = FIX) -> Any:
    """JSON text as a checked value.

    Args:
        text: The JSON.
        shape: What it must be.
        source: Where it is from, for the error.
        fix: What the error says to do.

    Raises:
        DataError: no JSON, a key twice, or another shape.
    """
    if len(text) > LARGEST:
        raise DataError(f"cannot use {source}", f"{len(text):,} characters; {LARGEST:,} at most", fix)
    return check(_loads(text, source, fix), shape, source, fix=fix)


def _loads(text: str, source: str, fix: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise DataError(f"cannot use {source}", f"it is nested deeper than {DEPTH} levels", fix) from None
    except ValueError as error:
        raise DataError(f"cannot use {source}", f"it is damaged, or no JSON ({error})", fix) from None


def check(value: Any, shape: Any, source: str, *, fix: str = FIX) -> Any:
    """A value of built-in types, checked; returned as it is.

    Raises:
        DataError: another shape.
    """
    _Checker(source, fix)(value, shape, "", 0)
    return value


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, one a line.

    A killed run or a crashed machine leaves a torn last line or NUL bytes. Lines that hold no record are left out, and
    a note with their number is printed.

    Raises:
        DataError: no such file, or no line of it is a record.
    """
    path = Path(path)
    _require_file(path, LARGEST_LOG, FIX)
    read = damaged = 0
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        while line := file.readline(LONGEST_LINE):
            if not (line := line.strip("\0 \r\n\t")):
                continue
            try:
                record = parse(line, dict[str, Any], str(path))
            except DataError:
                damaged += 1
                continue
            read += 1
            yield record
    if damaged and not read:
        raise DataError(f"cannot use {path}", "none of its lines is a record of numbers", FIX)
    if damaged:
        say(f"note: {damaged} damaged line(s) of {path} left out (a killed run leaves one)")


def _text(path: Path, fix: str, largest: int = LARGEST) -> str:
    _require_file(path, largest, fix)
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot use {path}", f"it is not UTF-8 text ({error.reason})", fix) from None
    except OSError as error:
        raise DataError(f"cannot read {path}", error.strerror or str(error), "check the path") from None


def _require_file(path: Path, largest: int, fix: str) -> None:
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read {path}", why, "check the path") from None
    if not stat.S_ISREG(about.st_mode):
        raise DataError(f"cannot read {path}", "it is no ordinary file", "check the path")
    if about.st_size > largest:
        raise DataError(f"cannot use {path}", f"{about.st_size:,} bytes; {largest:,} at most", fix)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return value


@functools.cache
def _keys(shape: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Types of the known keys of a TypedDict or dataclass, and which of them must be there."""
    hints = get_type_hints(shape, include_extras=True)
    if is_dataclass(shape):
        absent = (MISSING, MISSING)
        return hints, frozenset(f.name for f in fields(shape) if (f.default, f.default_factory) == absent)
    bare = {
        key: get_args(kind)[0] if get_origin(kind) in (Required, NotRequired) else kind for key, kind in hints.items()
    }
    return bare, shape.__required_keys__


def _is_object(shape: Any) -> bool:
    """Whether a shape names its keys."""
    return is_typeddict(shape) or is_dataclass(shape)


KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def _kind(shape: Any) -> Any:
    """The built-in type of a shape's values; None for null, Any for any."""
    origin = get_origin(shape)
    if origin is Annotated:
        return _kind(get_args(shape)[0])  # of both kinds of Annotated
    if origin is Literal:
        return type(get_args(shape)[0])
    if _is_object(shape):
        return dict
    if shape in (None, types.NoneType):
        return None
    return list if origin is tuple else origin or shape


def _words(shape: Any) -> str:
    """A shape in words, for errors."""
    origin, inside = get_origin(shape), get_args(shape)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, inside)))
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin is tuple:
        return f"a list of {len(inside)}"
    if origin is Annotated and isinstance(limits := inside[1], Limits):
        span = "" if math.isinf(limits.low) else f" from {limits.low:g}"
        return _words(inside[0]) + span + ("" if math.isinf(limits.high) else f" to {limits.high:g}")
    kind = _kind(shape)
    return "null" if kind is None else KINDS.get(kind, "JSON")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a built-in type: whole numbers are numbers, true and false are neither."""
    if kind is Any:
        return True
    if kind is None:
        return value is None
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind or (kind is list and type(value) is tuple)


class _Checker:
    """Walks a value and its shape side by side; refuses at the first difference."""

    def __init__(self, source: str, fix: str) -> None:
        self.source, self.fix, self.seen = source, fix, 0

    def refuse(self, place: str, what: str) -> DataError:
        """The error, with the place in the value."""
        return DataError(f"cannot use {self.source}", f"{place.lstrip('.') or 'its content'} {what}"[:600], self.fix)

    def __call__(self, value: Any, shape: Any, place: str, depth: int) -> None:
        self.seen += 1
        if self.seen > VALUES:
            raise self.refuse("", f"holds more than {VALUES:,} values")
        if depth > DEPTH:
            raise self.refuse(place[:80], f"is nested deeper than {DEPTH} levels")
        origin = get_origin(shape)
        if origin in (Union, types.UnionType):
            options = [option for option in get_args(shape) if _fits(value, _kind(option))]
            if not options:
                raise self.wrong(value, shape, place)
            return self.any_of(value, options, place, depth)
        if origin is Annotated:
            base, inner = get_args(shape)[:2]
            if not isinstance(inner, Limits):
                return self(value, inner, place, depth)
            return self.limited(value, base, inner, shape, place, depth)
        if not _fits(value, _kind(shape)):
            raise self.wrong(value, shape, place)
        if origin is Literal and value not in get_args(shape):
            raise self.wrong(value, shape, place)
        if type(value) in (int, float):
            self.number(value, shape, place)
        elif type(value) is str:
            self.text(value, place)
        elif isinstance(value, list | tuple):
            self.items(value, shape, place, depth)
        elif type(value) is dict:
            self.entries(value, shape, place, depth)
        elif not isinstance(value, bool | None):
            raise self.wrong(value, shape, place)
        return None

    def any_of(self, value: Any, options: list[Any], place: str, depth: int) -> None:
        """Check against the first that fits; the error is that of the last."""
        for option in options[:-1]:
            try:
                return self(value, option, place, depth)
            except DataError:
                continue
        return self(value, options[-1], place, depth)

    def wrong(self, value: Any, shape: Any, place: str) -> DataError:
        """The error for a value of another kind."""
        short = repr(value) if type(value) in (int, float, bool, str, type(None)) else KINDS.get(type(value), "no JSON")
        return self.refuse(place, f"is {short[:80]}, expected {_words(shape)}")

    def number(self, value: float, shape: Any, place: str, *, finite: bool = True) -> None:
        """Bounds of every number; only Any and what says so may be NaN or infinite."""
        if type(value) is int and abs(value) > WHOLE:
            raise self.refuse(place, f"is a number of {len(hex(value)) - 2} hex digits, too large")
        if finite and shape is not Any and not math.isfinite(value):
            raise self.refuse(place, f"is {value}, expected a finite number")

    def text(self, value: str, place: str) -> None:
        """Bounds of every text; text that UTF-8 cannot hold could not be written again."""
        if len(value) > TEXT:
            raise self.refuse(place, f"has {len(value):,} characters; {TEXT:,} at most")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise self.refuse(place, "holds half a character (a lone surrogate)") from None

    def limited(self, value: Any, base: Any, limits: Limits, shape: Any, place: str, depth: int) -> None:
        """A value within limits."""
        if type(value) in (int, float) and _fits(value, _kind(base)):
            self.number(value, base, place, finite=limits.finite)
            size: float = value
        else:
            self(value, base, place, depth)
            size = len(value)
        if not (limits.low <= size <= limits.high or (math.isnan(size) and not limits.finite)):
            raise self.wrong(value, shape, place)

    def items(self, value: Any, shape: Any, place: str, depth: int) -> None:
        """A list: any number of one shape, or as many as a tuple has."""
        shapes = get_args(shape)
        if get_origin(shape) is tuple and len(value) != len(shapes):
            raise self.refuse(place, f"has {len(value)} entries, expected {len(shapes)}")
        each = shapes[0] if shapes and get_origin(shape) is list else Any
        rows: Iterable[int] = range(len(value))
        if _kind(each) in (int, float) and value and all(type(item) is int for item in value):
            rows = {value.index(min(value)), value.index(max(value))}  # pixel counts come by the hundred thousand
            self.seen += len(value)
        for i in sorted(rows):
            item = value[i]
            self(item, shapes[i] if get_origin(shape) is tuple else each, f"{place}[{i}]", depth + 1)

    def entries(self, value: dict[Any, Any], shape: Any, place: str, depth: int) -> None:
        """An object: of known keys, or of any keys and one shape."""
        known, needed = _keys(shape) if _is_object(shape) else ({}, frozenset())
        if missing := [key for key in known if key in needed and key not in value]:
            raise self.refuse(place, f"has no {missing[0]!r}")
        each = get_args(shape)[1] if get_origin(shape) is dict else Any
        for key, item in value.items():
            if type(key) is not str:
                raise self.refuse(place, f"has a key that is no text: {key!r:.80}")
            self.text(key, place)
            self(item, known.get(key, each), f"{place}.{key}"[:300], depth + 1)
