"""What a search stores: shapes for :mod:`tinymim.schema`."""

from typing import Any, Required, TypedDict

from tinymim.schema import Above0, AnyNumber, AtLeast0, Count


class Row(TypedDict, total=False):
    """One line of candidates.jsonl: a model that was measured and scored.

    ``score``: None where it could not be scored, or was measured slower than its parent: ``why`` says so.
    """

    step: Required[Count]
    factor: Required[str]
    change: Required[str]
    config: Required[dict[str, Any]]
    params: Required[Count]
    macs: Required[Count]
    latency_ms: Required[Above0 | None]
    score: Required[AnyNumber | None]
    why: Required[str | None]
    seconds: Required[AtLeast0]
    sha256: Required[str | None]


class Search(TypedDict):
    """search.json: what a search was begun with."""

    settings: dict[str, Any]
