"""Configs inside files are data: lines ``name = literal``, read without running anything. Standard library only."""

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinymim.errors import ConfigError

LENGTH, DEPTH, VALUES = 1 << 20, 64, 1 << 18  # most characters of a text, levels of nesting, values


def read_literals(text: str, where: str | Path) -> dict[str, Any]:
    """Name -> value of a text of ``name = literal``, as our run folders and segmentors and MMEngine's files hold it.

    Values are None, bools, numbers, texts, names of earlier lines, and lists, tuples and dicts (also spelled
    ``dict(a=1)``) of these. Texts on lines of their own (docstrings) are passed over.

    Args:
        text: The text; nothing in it is executed.
        where: The file it comes from, for errors.

    Raises:
        ConfigError: anything else stands in the text, or it is too long or too deep.
    """
    if len(text) > LENGTH:
        raise _not_data(where, f"it has {len(text)} characters, more than {LENGTH}")
    try:
        body = ast.parse(text.removeprefix("\ufeff")).body
    except SyntaxError as error:
        raise _not_data(where, f"line {error.lineno or 1}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a zero byte, brackets without end
        raise _not_data(where, f"it cannot be parsed ({type(error).__name__})") from None
    reader = _Reader(where)
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            reader.found[node.targets[0].id] = reader.value(node.value, DEPTH)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise _not_data(where, f"line {node.lineno} is no assignment of a value: {_shown(node)}")
    return reader.found


def read_literal_file(path: str | Path) -> dict[str, Any]:
    """:func:`read_literals` of a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return read_literals(file.read(LENGTH + 1), path)
    except (OSError, ValueError) as error:
        raise _not_data(path, str(error)) from None


def not_literal(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a value that :func:`read_literals` would not read back."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from not_literal(item, f"{name}.{key}" if name else str(key))
            if not isinstance(key, str | int | float | bool | None):
                yield f"{name}.{key}", key
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from not_literal(item, f"{name}.{i}")
    elif type(value) not in (str, int, float, bool, type(None)):
        yield name, value


class _Reader:
    """Values of literals, and of the names of the lines before."""

    def __init__(self, where: str | Path) -> None:
        self.where, self.left = where, VALUES
        self.found: dict[str, Any] = {}

    def value(self, node: ast.expr, depth: int) -> Any:
        """The value of a literal, or an error that names its line."""
        self.left -= 1
        if depth == 0 or self.left < 0:
            limit = f"nested more than {DEPTH} levels deep" if depth == 0 else f"beyond {VALUES} values"
            raise _not_data(self.where, f"line {node.lineno} is {limit}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.found:
            return self._copy(self.found[node.id], node, depth)
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):  # as Python writes these numbers
            return math.inf if node.id == "inf" else math.nan
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.value(node.operand, depth - 1)
            if type(number) in (int, float):
                return -number
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth - 1) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant | ast.UnaryOp) for key in node.keys):
            keys = [self.value(key, depth - 1) for key in node.keys if key is not None]
            return dict(zip(keys, [self.value(item, depth - 1) for item in node.values], strict=True))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            named = {key.arg: key.value for key in node.keywords if key.arg is not None}
            if len(named) == len(node.keywords):  # none is **something
                return {name: self.value(item, depth - 1) for name, item in named.items()}
        raise _not_data(self.where, f"line {node.lineno} is no plain value: {_shown(node)}")

    def _copy(self, value: Any, node: ast.expr, depth: int) -> Any:
        """A copy of a named value, which counts as if it were written out."""
        self.left -= 1
        if depth == 0 or self.left < 0:
            raise _not_data(self.where, f"line {node.lineno} is too large with {_shown(node)} written out")
        if isinstance(value, dict):
            return {key: self._copy(item, node, depth - 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, node, depth - 1) for item in value)
        return value


def _shown(node: ast.AST) -> str:
    try:
        text = " ".join(ast.unparse(node).split())
    except RecursionError:
        text = type(node).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def _not_data(where: str | Path, why: str) -> ConfigError:
    return ConfigError(
        f"the config in {where} is not plain data",
        f"{why}; configs inside run folders and checkpoints are read as data and never run",
        "use the file as the command wrote it",
    )
