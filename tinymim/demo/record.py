"""What demo.json holds, as far as the page and a resumed demo read it: a shape for :mod:`tinymim.schema`."""

from typing import Annotated, Any, Required, TypedDict

from tinymim.records import AtLeast0, BenchRow, Colour, Cost, Count, Machine, Milliseconds, Parity, Pixels, Share
from tinymim.schema import Limits


class Stage(TypedDict):
    """What every stage says."""

    seconds: AtLeast0
    peak_mib: AtLeast0


class Data(Stage):
    """Photos."""

    source: str
    train: Count
    val: Count
    size: tuple[Pixels, Pixels]
    classes: list[str]
    palette: list[Annotated[Colour, Limits(3, 3)]]


class Backbone(TypedDict):
    """Shape of a ViT."""

    depth: Count
    embed_dim: Count


class Training(Stage):
    """Teacher, student."""

    steps: Count
    shape: Backbone
    parameters: Count


class Segmentor(Stage):
    """Scores of the PyTorch segmentor."""

    steps: Count
    images: Count
    mIoU: Share
    aAcc: Share
    constant_mIoU: Share
    class_IoU: dict[str, Share | None]


class Export(Stage):
    """The file and its check."""

    cost: Cost
    parity: Parity


class Row(BenchRow):
    """A timed file, with everything the page shows."""

    p90_ms: Required[Milliseconds]  # type: ignore[misc]
    p95_ms: Required[Milliseconds]  # type: ignore[misc]
    p99_ms: Required[Milliseconds]  # type: ignore[misc]
    images_per_s: Required[AtLeast0]  # type: ignore[misc]
    peak_mib: Required[AtLeast0]  # type: ignore[misc]
    file_mib: Required[AtLeast0]  # type: ignore[misc]


class Part(TypedDict):
    """Time of a part."""

    part: str
    params: Count
    macs: Count
    ms: AtLeast0
    share: Share


class Split(TypedDict):
    """Where the milliseconds go."""

    rows: list[Part]
    ratio: AtLeast0
    remarks: list[str]


class OnnxScore(TypedDict):
    """Score of the file; stems of the photos on the page."""

    mIoU: Share
    images: Count
    shown: list[tuple[Share, str]]


class Measure(Stage):
    """Times of the file."""

    rows: Annotated[list[Row], Limits(1)]
    splits: Annotated[list[Split], Limits(1)]
    onnx: OnnxScore


class Stages(TypedDict, total=False):
    """Those that are finished."""

    data: Data
    teacher: Training
    student: Training
    segmentor: Segmentor
    export: Export
    measure: Measure


class DemoFile(TypedDict):
    """demo.json."""

    settings: dict[str, Any]
    environment: Machine
    stages: Stages
