"""What a run folder's config.py says: its settings, and the command that started it. No torch; nothing is run."""

import ast
import contextlib
import re
import shlex
from pathlib import PurePath
from typing import Any

from tinymim.errors import TinyMIMError
from tinymim.literals import read_literals
from tinymim_export.report.page import hide_paths


def noted_command(config: str) -> str | None:
    """The command line that a run's config.py notes: words in a comment; in older ones a text in the docstring."""
    if words := re.search(r"^# command: (\[.*\])$", config, re.MULTILINE):
        with contextlib.suppress(TinyMIMError):
            found = read_literals(f"command = {words[1]}", "config.py")["command"]
            return shlex.join(
                f".../{PurePath(word).name}" if word.startswith("/") else word for word in map(str, found)
            )
    words = re.match(r'"""Resolved recipe of this run \((.*)\)\."""', config)
    return words[1] if words else None


def flat_settings(text: str) -> dict[str, Any]:
    """Assignments of a recipe or config file as dotted keys -> plain values; paths shortened to their last name."""
    found: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}" if key else str(name), item)
        else:
            found[key] = hide_paths(repr(value))

    with contextlib.suppress(SyntaxError):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                try:
                    value = ast.literal_eval(node.value)
                except ValueError:
                    value = ast.unparse(node.value)
                add(node.targets[0].id, value)
    return found
