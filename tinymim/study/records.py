"""What the files of a study hold: shapes for :mod:`tinymim.schema`."""

from typing import Any, Required, TypedDict

from tinymim.records import DataNote, SomeMachine
from tinymim.schema import AnyNumber, AtLeast0, Count


class StageDone(TypedDict, total=False):
    """done.json of a stage of a study."""

    reads: dict[str, str | None]
    seconds: Required[list[AtLeast0]]
    machine: Required[SomeMachine]
    student_sha256: Required[str | None]
    result: Required[dict[str, AnyNumber]]


class CellResult(TypedDict, total=False):
    """seedN.json of a study: one cell and seed."""

    study: str
    cell: str
    seed: Count
    scores: Required[dict[str, AnyNumber]]
    seconds: Required[dict[str, AtLeast0]]
    settings: Required[dict[str, dict[str, Any]]]
    data: Required[dict[str, DataNote]]
    stages: Required[dict[str, str]]
    student_sha256: Required[dict[str, str | None]]
    machine: Required[SomeMachine]


class Renaming(TypedDict):
    """One renamed result of a study."""

    file: str
    sha256_before: str


class Renamings(TypedDict):
    """renamed.json of a study."""

    results: list[Renaming]
