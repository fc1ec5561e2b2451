"""Errors a user can act on: what happened, why, and what to type now. Standard library only."""

import difflib
from collections.abc import Callable, Iterable


class TinyMIMError(Exception):
    """A problem the user can fix. Commands print it without a traceback and exit with ``exit_code``.

    Args:
        what: What happened, one sentence.
        why: Why it happened.
        fix: What to type or change now.
    """

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")
        self.what, self.why, self.fix = what, why, fix


class CheckpointError(TinyMIMError):
    """A checkpoint file that cannot be read, or does not fit the model."""


class DataError(TinyMIMError):
    """A folder, photo or label file that is missing or wrong."""


class ConfigError(TinyMIMError):
    """A recipe, configuration or command line that does not make sense."""


class CheckFailed(TinyMIMError):
    """A verification or quality check that did not pass (exit code 1)."""

    exit_code = 1


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str = "choose one of these", spelled: Callable[[str], str] = repr
) -> str:
    """The ``fix`` for an unknown name: the nearest known one as ``spelled`` writes it, or else ``otherwise``."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {spelled(near[0])}?" if near else otherwise
