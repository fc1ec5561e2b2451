"""Recipes, studies and MMSegmentation configs that a user names: Python files, run by MMEngine's ``Config``.

They are the user's own and may compute and import (``custom_imports``); what a command wrote is read by
:mod:`tinymim.literals` instead. Whatever goes wrong in such a file becomes our error, with its file and line.
"""

import builtins
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config import config as mmengine_config

from tinymim.errors import ConfigError, TinyMIMError

SUFFIXES = (".py", ".json", ".yaml", ".yml")


def load_python(path: str | Path) -> Config:
    """Run a config file and those it inherits from, import its ``custom_imports``.

    Args:
        path: A file of one of :data:`SUFFIXES`.

    Raises:
        ConfigError: no such file, or it cannot be read or run; the message gives file and line.
    """
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "the file does not exist"
        raise ConfigError(f"cannot read {path}", what, "check the path")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"cannot read {path}", f"a config is a file {', '.join(SUFFIXES)}", "check the path")
    try:
        with _byte_order_marks():
            return Config.fromfile(str(path))
    except (KeyboardInterrupt, TinyMIMError):
        raise
    except BaseException as error:  # SystemExit too: whatever a user's code may raise
        root = _root(error)
        raise ConfigError(f"cannot read {path}", f"{_place(root, path)}: {_why(root)}", "correct the file") from error


def _root(error: BaseException) -> BaseException:
    """The first error: MMEngine raises an ImportError of its own, with all of ``sys.path``, over that of an import."""
    while isinstance(error, ImportError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _why(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; a module of custom_imports must be installed, or lie in a folder of PYTHONPATH"
    return f"{type(error).__name__}: {error}".strip(": ").partition("\n")[0]


def _place(error: BaseException, path: Path) -> str:
    """The file, and where known the line, of the user's code that raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, SyntaxError) and Path(str(error.filename)).is_file():
        return f"{error.filename}, line {error.lineno}"
    own = [f"{frame.f_code.co_filename}, line {line}" for frame, line in frames if _is_users(frame.f_code.co_filename)]
    if own and not isinstance(error, SyntaxError):
        return own[-1]
    reading = [name for frame, _ in frames if Path(str(name := frame.f_locals.get("filename"))).is_file()]
    line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
    return f"{(reading or [path])[-1]}{line}"


def _is_users(file: str) -> bool:
    """Whether a source file is neither Python's, MMEngine's nor ours."""
    ours = (Path(__file__).parents[1], Path(mmengine_config.__file__).parents[1])
    stdlib = Path(sysconfig.get_path("stdlib"))
    path = Path(file)
    return (
        path.is_file()
        and not any(map(path.is_relative_to, ours))
        and (not path.is_relative_to(stdlib) or "site-packages" in path.parts)
    )


@contextmanager
def _byte_order_marks() -> Iterator[None]:
    """MMEngine opens configs as "utf-8", which keeps a byte order mark."""

    def opened(file: Any, mode: str = "r", *, encoding: str | None = None) -> Any:
        return builtins.open(file, mode, encoding="utf-8-sig" if mode == "r" else encoding)

    mmengine_config.open = opened  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del mmengine_config.open  # type: ignore[attr-defined]
