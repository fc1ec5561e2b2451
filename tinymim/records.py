"""What every stored record holds: shapes for :mod:`tinymim.schema`, one a kind of file. Standard library only.

A key is required where a reader cannot do without it; keys of newer or older versions are kept and left alone.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

from tinymim.schema import Above0, AnyNumber, AtLeast0, Count, Limits, Share, read_json

Pixels = Annotated[int, Limits(1, 2**16)]  # a side
Colour = list[Annotated[int, Limits(0, 255)]]
Interval = tuple[float, float]
Ratio = tuple[Above0, Above0, Above0]  # a ratio and its interval
Milliseconds = Annotated[float, Limits(1e-9, 1e12)]
Shape4 = Annotated[list[Count], Limits(1, 8)]  # of an input: N, 3, H, W
FileName = Annotated[str, Limits(1, 255)]


class FileNote(TypedDict, total=False):
    """A file that a run read: :func:`tinymim.files.describe_file`."""

    file: str | None
    sha256: str | None


class DataNote(TypedDict, total=False):
    """A folder that a run read: :func:`tinymim.files.describe_files`."""

    folder: Required[str]
    files: Required[Count]
    list_sha256: Required[str]


class ShardIndex(TypedDict):
    """``.NAME.tar.index`` beside a shard: :mod:`tinymim.data.shards`."""

    stamp: str
    passed: Count
    names: list[str]
    offsets: list[Count]
    sizes: list[Count]


class Inputs(TypedDict, total=False):
    """``inputs`` of env.json."""

    teacher: FileNote | list[FileNote] | None
    student: FileNote | list[FileNote] | None
    init_from: FileNote | None
    data: DataNote | None
    val_data: DataNote | None
    pseudo: DataNote | None
    recipe_sha256: str | None
    config_sha256: str | None
    processes: Count
    micro_batch: Count
    compiled: bool


class Versions(TypedDict, total=False):
    """What every record of a machine may hold."""

    platform: str
    versions: dict[str, str]
    machine: str
    cpu_features: dict[str, bool] | None
    threads: Count


class Machine(Versions, total=False):
    """:func:`tinymim.files.environment`, and what benches add to it."""

    cpu: Required[str]
    cores: Required[Count]


class SomeMachine(Versions, total=False):
    """The same where an .onnx file, or an old one, names versions only."""

    cpu: str
    cores: Count


class Environment(SomeMachine, total=False):
    """env.json of a run folder."""

    inputs: Inputs
    outputs: dict[str, str]
    earlier: list[dict[str, Any]]


class Photos(TypedDict):
    """Pixels by photo and class."""

    names: list[str]
    right: list[list[Count]]
    labelled: list[list[Count]]
    predicted: list[list[Count]]


class Score(TypedDict, total=False):
    """result.json of a segmentor: what training and :func:`tinymim_export.runtime.miou.evaluate` share."""

    mIoU: Required[Share | None]
    mAcc: Share | None
    aAcc: Share | None
    constant_mIoU: Share | None
    images: Count
    mode: str
    data: str
    class_IoU: dict[str, Share | None]
    photos: Photos | None
    confusion: list[list[Count]] | None
    mIoU_interval: Interval | None


class Eval(Score, total=False):
    """``tinymim eval --json``."""

    file: str
    sha256: Required[str]
    engine: Required[str]


class TopScore(TypedDict, total=False):
    """Scores of a classifier on one set of photos; of ImageNet-C, other keys."""

    top1: Share | None
    top5: Share | None
    photos: Count


class Accuracy(TypedDict):
    """``tinymim eval --json`` of a classifier."""

    file: FileNote
    scores: dict[str, TopScore]


class BenchRow(TypedDict, total=False):
    """A file on a runtime."""

    file: Required[str]
    sha256: Required[str]
    engine: str
    provider: str
    gpu: str | None
    shape: Required[Shape4]
    threads: Required[Count]
    runs: Count
    p50_ms: Required[Milliseconds]
    p50_interval: tuple[Milliseconds, Milliseconds] | None
    p90_ms: AtLeast0 | None
    p95_ms: AtLeast0
    p99_ms: AtLeast0
    speed_up: Ratio | None
    steady: bool
    images_per_s: AtLeast0
    peak_mib: AtLeast0 | None
    file_mib: AtLeast0
    precision: str | None


class Bench(TypedDict, total=False):
    """``tinymim bench --json``."""

    kind: Required[Literal["tinymim.bench"]]
    rows: Required[Annotated[list[BenchRow], Limits(1)]]
    splits: list[Any]
    settings: dict[str, Any]
    environment: Required[Machine]


class TimedRow(BenchRow):
    """A row that ``bench --compare`` can use."""

    engine: Required[str]  # type: ignore[misc]
    p50_interval: Required[tuple[Milliseconds, Milliseconds]]  # type: ignore[misc]


class TimedBench(Bench):
    """``tinymim bench --json`` as ``--compare`` needs it."""

    rows: Required[Annotated[list[TimedRow], Limits(1)]]  # type: ignore[misc]


class Part(TypedDict, total=False):
    """Cost of a part of a model."""

    params: Required[Count]
    macs: Required[Count]
    tensors: list[str]


class Cost(TypedDict, total=False):
    """Parameters and multiply-adds at a size."""

    size: tuple[Pixels, Pixels]
    width: Count | None
    parts: dict[str, Part]
    params: Count
    macs: Count


class ParityRow(TypedDict, total=False):
    """One comparison of two files."""

    name: Required[str]
    shape: Required[Shape4]
    source: Required[str]
    passed: Required[bool]
    max_error: AnyNumber | None
    relative_error: AnyNumber | None
    cosine: AnyNumber | None
    equal_pixels: Share | None
    remark: str


class TestStep(TypedDict):
    """Pixels of one photo's mask that the file's whole contract gives as the model's own test does."""

    equal: Count
    pixels: Annotated[int, Limits(1, 2**40)]


class ParitySummary(TypedDict, total=False):
    """The worst of all comparisons."""

    relative_error: AnyNumber | None
    cosine: AnyNumber | None
    equal_pixels: Share | None
    photos: bool
    test_step: TestStep | None
    graph_sha256: str | None
    contract_sha256: str | None


class Parity(TypedDict, total=False):
    """All comparisons of a file."""

    file: str
    passed: bool
    summary: ParitySummary
    rows: list[ParityRow]


class Calibration(TypedDict, total=False):
    """Photos that gave the ranges of an INT8 file."""

    folder: str
    count: Count
    seed: Annotated[int, Limits(-(2**53))]
    method: str
    list_sha256: str
    files: list[tuple[str, str]]


class Export(TypedDict, total=False):
    """``tinymim-export --json``."""

    kind: str
    onnx: str | None
    file: str | None
    sha256: str
    precision: str
    mib: AtLeast0
    parity: Parity | None


class SensitivityRow(TypedDict, total=False):
    """The cost of one block in another precision."""

    block: Required[str]
    miou: Share
    drop: Required[Annotated[float, Limits(-1, 1)]]
    equal_pixels: Required[Share]
    class_drop: Required[dict[str, Annotated[float, Limits(-1, 1)]]]
    sha256: str


class Sensitivity(TypedDict, total=False):
    """``tinymim-export --sensitivity --json``."""

    kind: Required[Literal["tinymim.sensitivity"]]
    file: Required[str]
    sha256: Required[str]
    precision: Required[str]
    images: Required[Count]
    rows: Required[list[SensitivityRow]]


class Candidate(TypedDict, total=False):
    """A measured file of the tuner."""

    name: Required[str]
    engine: Required[str]
    precision: str
    graph: list[str]
    runtime: str
    provider: str
    file: str
    sha256: Required[str]
    copy_of: str | None
    shape: Required[Shape4]
    threads: Required[Count]
    p50_ms: Required[Milliseconds]
    p50_interval: Interval | None
    p90_ms: AtLeast0 | None
    peak_mib: AtLeast0 | None
    speed_up: Ratio | None
    mIoU: Required[Share]
    mIoU_interval: Interval | None
    drop: Required[Annotated[float, Limits(-1, 1)]]
    drop_interval: Required[Interval]
    class_IoU: dict[str, Share | None]
    images: Count
    mode: str
    data: str
    gpu: str | None
    verdict: Required[str]
    reasons: list[str]
    remarks: list[str]


class Tune(TypedDict, total=False):
    """tune.json."""

    kind: Required[Literal["tinymim.tune"]]
    candidates: Required[list[Candidate]]
    left_out: list[tuple[str, str]]
    winner: Candidate | None
    budget: dict[str, float | None] | None
    why: str
    settings: dict[str, Any]
    environment: Required[Machine]


class Compared(TypedDict, total=False):
    """One segmentor and seed of tools/compare_segmentors.py."""

    score: Eval


class Compare(TypedDict, total=False):
    """What tools/compare_segmentors.py writes."""

    models: Required[dict[str, dict[str, Compared]]]
    measure: Bench | None


class Resize(TypedDict, total=False):
    """How a photo becomes the network's input; sizes are (width, height) in ``scale``, (height, width) elsewhere."""

    scale: Annotated[list[Pixels], Limits(2, 2)] | None
    keep_ratio: bool
    mode: str
    crop: tuple[Pixels, Pixels] | None
    slide_stride: tuple[Pixels, Pixels] | None
    align_corners: bool
    threshold: Share | None
    pad: dict[str, Any] | None
    multiple: Annotated[list[Pixels], Limits(2, 2)]
    untold: str | None


class Precision(TypedDict, total=False):
    """How an .onnx file was reduced."""

    name: str
    parent_sha256: str | None
    calibration: Calibration | None
    excluded: list[str]


class Contract(TypedDict, total=False):
    """``tinymim.*`` of an .onnx file: everything a program needs to use it."""

    part: str
    classes: list[str] | None
    palette: list[Annotated[Colour, Limits(3, 3)]] | None
    mean: tuple[float, float, float] | None
    std: tuple[Above0, Above0, Above0] | None
    channel_order: str
    stride: Count
    resize: Resize | None
    checkpoint_sha256: str | None
    config_sha256: str | None
    versions: dict[str, str]
    cost: Cost | None
    verified: bool | None
    parity: ParitySummary | None
    precision: Precision | None
    graph: list[str] | None
    input: dict[str, str] | None
    tracker: dict[str, Any]
    tune: dict[str, Any] | None


class Names(TypedDict):
    """Class names, as in dataset.json."""

    classes: list[str]


class Hop(TypedDict, total=False):
    """One distillation of a chain."""

    run: Required[FileName]
    student: Required[str]
    teacher: Required[str]
    relations: tuple[Count, Count] | None
    steps: Required[Count]
    seconds: Required[AtLeast0]


class Chain(TypedDict):
    """chain.json."""

    chain: str | None
    hops: list[Hop]


class DemoStage(TypedDict, total=False):
    """One finished stage of a demo, as far as a report reads it."""

    rows: list[BenchRow]
    environment: Machine
    onnx: Score | str
    parity: Parity
    cost: Cost


class Demo(TypedDict):
    """demo.json."""

    settings: dict[str, Any]
    environment: Machine
    stages: dict[str, DemoStage]


class StoredArray(TypedDict):
    """An array of every record of a target store."""

    name: str
    dtype: str
    shape: Annotated[list[Pixels], Limits(0, 4)]


class StoredTeacher(TypedDict):
    """Who gave the targets of a store."""

    name: str
    sha256: str | None


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
    augmentation: dict[str, Any]
    precision: str
    data: dict[str, Any]
    versions: dict[str, str]


def read_env(folder: str | Path) -> dict[str, Any]:
    """env.json of a run folder; {} where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = Path(folder) / "env.json"
    return read_json(path, Environment) if path.is_file() else {}
