"""What ``store.json`` of a target store holds: a shape for :mod:`tinymim.schema`."""

from typing import Annotated, Any, Literal, Required, TypedDict

from tinymim.records import Pixels
from tinymim.schema import Count, Limits


class StoredArray(TypedDict):
    """An array of every record of a target store."""

    name: str
    dtype: str
    shape: Annotated[list[Pixels], Limits(0, 4)]


class StoredTeacher(TypedDict):
    """Who gave the targets of a store."""

    name: str
    sha256: str | None


class StoredEntry(TypedDict):
    """A tap, or the pair of a relation, of a block."""

    block: Annotated[int, Limits(1, 2**10)]
    taps: Annotated[list[str], Limits(1, 2)]
    form: str
    tokens: Annotated[int, Limits(1, 2**20)]


class RelationHeader(TypedDict):
    """What a store of kind "relations" holds, and of which teacher."""

    targets: list[str]
    block: Annotated[int, Limits(1, 2**10)]
    form: str
    entries: Annotated[list[StoredEntry], Limits(1, 64)]
    heads: Annotated[int, Limits(1, 2**16)]
    width: Annotated[int, Limits(1, 2**20)]
    depth: Annotated[int, Limits(1, 2**10)]
    class_token: bool
    grid: Annotated[list[Pixels], Limits(2, 2)]
    align: str | None
    softmax: bool


class TargetHeader(TypedDict, total=False):
    """store.json of a target store."""

    format: Required[Literal["tinymim.targets"]]
    version: Required[Literal[1]]
    kind: Required[str]
    arrays: Required[Annotated[list[StoredArray], Limits(1, 64)]]
    photos: Required[Annotated[int, Limits(1, 2**32)]]
    epochs: Required[Annotated[int, Limits(1, 2**20)]]
    chunk: Required[Annotated[int, Limits(1, 2**24)]]
    seed: Required[Count]
    pairs: Required[bool]
    keys_sha256: Required[str]
    teacher: StoredTeacher
    topk: Count
    classes: Count
    class_names: list[str]
    relations: RelationHeader
    augmentation: dict[str, Any]
    precision: str
    data: dict[str, Any]
    versions: dict[str, str]
