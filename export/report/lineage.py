"""What is known about a lineage of files: teacher -> student -> segmentor -> .onnx files, joined by sha256. No torch.

A :class:`File` is one file, a :class:`Score` its mIoU on one engine, a :class:`Time` its latency on one engine and
machine. A :class:`Lineage` joins them. What was not recorded stays None; nothing is guessed from names or places.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Required, TypedDict, TypeVar

import numpy as np

from tinymim import records
from tinymim.schema import Count, Share
from tinymim_export.bench.stats import bootstrap_miou_drop
from tinymim_export.precision.base import PRECISIONS
from tinymim_export.runtime.engines.base import DEFAULT, engine_label

PYTORCH = "PyTorch"
BASE = engine_label(DEFAULT, "cpu", None)  # what every file is compared on
TUNED = "tuner:"  # marks scores of which the tuner kept totals only
Kind = TypeVar("Kind", "File", "Score", "Time")
ROLES = ("teacher", "student", "segmentor", "classifier", "tracker", "detector", "onnx")


class DetectorScore(TypedDict, total=False):
    """What a report reads of COCO's scores."""

    box_ap: Required[Share]
    mask_ap: Required[Share]
    photos: Required[Count]


class Detected(TypedDict, total=False):
    """What a report reads of ``result.json`` of a detection run; no scores without photos that are held out."""

    scores: DetectorScore | None


@dataclass
class File:
    """One file by its sha256; fields are None where nothing says them.

    Attributes:
        given: False: only its sha256 is known, from the file made of it.
        role: One of ROLES.
        parents: What it was made from -> sha256: "teacher" ("teacher 2", ... where there are several), "student",
            "checkpoint", "fp32 file".
        macs: Multiply-adds at ``size``.
        excluded: Blocks a quantised file keeps in float.
        settings: Flat recipe, dotted keys.
        curves: A few points of loss and mIoU over training steps.
        path: Where it is now; not written to JSON.
    """

    sha256: str
    name: str
    role: Annotated[str, Literal[ROLES]]
    given: bool = True
    parents: dict[str, str] = field(default_factory=dict)
    mib: float | None = None
    parameters: int | None = None
    macs: int | None = None
    size: list[int] | None = None
    output: str | None = None
    precision: str | None = None
    graph: list[str] = field(default_factory=list)
    pixels: bool = False
    excluded: list[str] = field(default_factory=list)
    calibration: Annotated[dict[str, Any], records.Calibration] | None = None
    verified: bool | None = None
    parity: Annotated[dict[str, Any], records.ParitySummary] | None = None
    palette: Annotated[list[list[int]], list[records.Colour]] | None = None
    recipe_sha256: str | None = None
    config_sha256: str | None = None
    data: Annotated[dict[str, Any], records.DataNote] | None = None
    environment: Annotated[dict[str, Any], records.SomeMachine] | None = None
    command: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    path: str | None = None

    @property
    def kind(self) -> str:
        """Precision and graph variants in words: "int8 attention pixels"."""
        return " ".join([self.precision or "", *self.graph]).strip()


@dataclass
class Counts:
    """Pixels by photo and class: predicted right, labelled, predicted; what a bootstrap over photos needs."""

    names: list[str]
    right_IC: Any
    labelled_IC: Any
    predicted_IC: Any

    def __post_init__(self) -> None:
        for name in ("right_IC", "labelled_IC", "predicted_IC"):
            setattr(self, name, np.asarray(getattr(self, name), np.int64))
        shapes = {self.right_IC.shape, self.labelled_IC.shape, self.predicted_IC.shape}
        if len(shapes) != 1 or self.right_IC.ndim != 2 or len(self.right_IC) != len(self.names):
            raise ValueError(f"counts of {len(self.names)} photos have the shapes {shapes}")


@dataclass
class Score:
    """mIoU of a file on one engine; fractions from 0 to 1.

    Attributes:
        engine: "onnxruntime cpu", "openvino cpu bf16", "PyTorch".
        folder: Name of the folder of photos.
        data: Hash of classes, photos and labels: scores compare only where it is equal. None: not recorded.
        interval: 95 % of the mIoU, drawn over photos.
        class_iou: Class -> IoU, None where the class never occurs.
        loss: mIoU of the FP32 original on the same photos minus its own; its 95 % interval, paired over photos.
        counts: Not written to JSON.
    """

    sha256: str
    engine: str
    miou: Annotated[float, records.Share]
    source: str
    macc: float | None = None
    aacc: float | None = None
    constant_miou: float | None = None
    images: int | None = None
    mode: str | None = None
    folder: str | None = None
    data: str | None = None
    interval: Annotated[list[float], records.Interval] | None = None
    class_iou: dict[str, float | None] = field(default_factory=dict)
    loss: float | None = None
    loss_interval: Annotated[list[float], records.Interval] | None = None
    counts: Counts | None = None


@dataclass
class Time:
    """Latency of a file on one engine and machine.

    Attributes:
        place: Machine, threads, batch and input size: times compare only where it is equal.
        interval: 95 % of the median, ms.
        speed_up: Times as fast as ``against`` and its 95 % interval, from runs in turns.
        against: "sha256 engine" of what it was timed in turns with.
    """

    sha256: str
    engine: str
    place: str
    p50_ms: Annotated[float, records.Milliseconds]
    source: str
    p90_ms: float | None = None
    interval: Annotated[list[float], records.Interval] | None = None
    peak_mib: float | None = None
    speed_up: Annotated[list[float], records.Ratio] | None = None
    against: str | None = None

    @property
    def key(self) -> str:
        """What another time's ``against`` calls this one."""
        return f"{self.sha256} {self.engine}"

    def than(self, base: "Time") -> tuple[float, str]:
        """How many times as fast as another time of the same place, and how sure that is: small print.

        Runs in turns give the ratio and its interval; otherwise it is that of the medians.
        """
        if self.speed_up and self.against == base.key and self.source == base.source:
            ratio, low, high = self.speed_up
            sure = "" if not low <= 1 <= high else ", not distinguishable"
            return ratio, f"{low:.2f} to {high:.2f}{sure}"
        ratio = base.p50_ms / self.p50_ms
        if self.source != base.source:
            return ratio, "two sessions"
        alike = (
            self.interval
            and base.interval
            and self.interval[0] <= base.interval[1]
            and (base.interval[0] <= self.interval[1])
        )
        return ratio, "not distinguishable" if alike else ""


@dataclass
class Row:
    """A file on one engine: its score and its times by place."""

    file: File
    engine: str | None
    score: Score | None
    times: dict[str, Time]


@dataclass
class Lineage:
    """Files with everything measured on them."""

    files: list[File] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    sensitivity: list[Annotated[dict[str, Any], records.Sensitivity]] = field(default_factory=list)
    exports: list[Annotated[dict[str, Any], records.Export]] = field(default_factory=list)
    verdicts: list[Annotated[dict[str, Any], records.Tune]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Lineage") -> None:
        """Add what another source says; of two entries about one thing the later one is kept."""
        for file in other.files:
            known = self.file(file.sha256)
            if known is None:
                self.files.append(file)
            elif file.given:
                _fill(known, file)
            else:
                known.notes += [note for note in file.notes if note not in known.notes]
        for ours, theirs, key in ((self.scores, other.scores, _score_key), (self.times, other.times, _time_key)):
            said = {key(item): item for item in [*ours, *theirs]}  # type: ignore[operator,misc]
            ours[:] = said.values()  # type: ignore[assignment]
        self.sensitivity += other.sensitivity
        self.exports += other.exports
        self.verdicts += other.verdicts
        self.notes += [note for note in other.notes if note not in self.notes]

    def file(self, sha256: str | None) -> File | None:
        """The file with this hash."""
        return next((file for file in self.files if file.sha256 == sha256), None)

    def join(self) -> None:
        """Give every parent a row, settle which file was the teacher and which the student, put the files in order."""
        for file in list(self.files):
            for relation, sha in file.parents.items():
                if self.file(sha) is None:
                    heads = {"logits": "segmentor", "mask": "segmentor", "box": "tracker"}
                    made_of = {"checkpoint": heads.get(file.output or "", "student"), "fp32 file": "onnx"}
                    role = made_of.get(relation, relation.split()[0])  # "teacher 2" is a teacher
                    self.files.append(File(sha, "not given", role, given=False))
        measured: list[Any] = [*self.scores, *self.times]
        for sha in dict.fromkeys(item.sha256 for item in measured):
            if self.file(sha) is None:
                named = next(item.source for item in measured if item.sha256 == sha)
                self.files.append(File(sha, f"not given (in {named})", "onnx", given=False))
        wanted = {(relation.split()[0], sha) for file in self.files for relation, sha in file.parents.items()}
        for file in self.files:
            if ("student", file.sha256) in wanted:
                file.role = "student"
            elif ("teacher", file.sha256) in wanted:
                file.role = "teacher"
        self.files.sort(key=self._place)
        self._settle_tuned()
        for score in self.scores:
            original = self.reference_score(score)
            if original is not None and original is not score:
                score.loss = original.miou - score.miou
                if original.counts and score.counts:
                    score.loss_interval = list(bootstrap_miou_drop(original.counts, score.counts))

    def _settle_tuned(self) -> None:
        """Full scores of a file replace the tuner's totals; the remaining totals are of the same photos."""
        full = {(s.sha256, s.engine): s for s in self.scores if s.data and not s.data.startswith(TUNED)}
        tuned = [s for s in self.scores if (s.data or "").startswith(TUNED)]
        photos = {s.data: twin.data for s in tuned if (twin := full.get((s.sha256, s.engine))) is not None}
        for score in tuned:
            if (score.sha256, score.engine) in full:
                self.scores.remove(score)
            score.data = photos.get(score.data, score.data)

    def _place(self, file: File) -> tuple[Any, ...]:
        known = list(PRECISIONS)
        precision = known.index(file.precision) if file.precision in known else len(known)
        return (ROLES.index(file.role), len(self.ancestors(file)), precision, len(file.graph), file.kind, file.name)

    def ancestors(self, file: File) -> list[File]:
        """What a file was made from, the oldest first (of several parents the checkpoint's side)."""
        found: list[File] = []
        while file.parents:
            relation = next((r for r in ("checkpoint", "student", "teacher", "fp32 file") if r in file.parents), "")
            parent = self.file(file.parents.get(relation))
            if parent is None or parent in found:
                break
            found.insert(0, parent)
            file = parent
        return found

    def checkpoint(self, file: File) -> str | None:
        """sha256 of the checkpoint an .onnx file was exported from, through its FP32 file if need be."""
        if "checkpoint" not in file.parents and (parent := self.file(file.parents.get("fp32 file"))) is not None:
            return parent.parents.get("checkpoint")
        return file.parents.get("checkpoint")

    def reference(self, file: File) -> File | None:
        """The FP32 file an .onnx is compared with: the one it names, or the plain one of the same checkpoint."""
        named = self.file(file.parents.get("fp32 file"))
        if named is not None:
            return named
        origin = self.checkpoint(file)
        plain = [
            f
            for f in self.files
            if f.role == "onnx"
            and f.precision == "fp32"
            and not f.graph
            and origin is not None
            and self.checkpoint(f) == origin
        ]
        return next((f for f in plain if f.size == file.size), plain[0] if plain else None)

    def reference_score(self, score: Score) -> Score | None:
        """The score of the FP32 original in plain ONNX Runtime, on the same photos in the same mode."""
        file = self.file(score.sha256)
        reference = None if file is None or score.data is None else self.reference(file)
        if reference is None:
            return None
        return next(
            (
                s
                for s in self.scores
                if s.sha256 == reference.sha256 and s.engine == BASE and (s.data, s.mode) == (score.data, score.mode)
            ),
            None,
        )

    def rows(self) -> list[Row]:
        """One row for every file and engine that scored or ran it."""
        rows = []
        for file in self.files:
            scores = [s for s in self.scores if s.sha256 == file.sha256]
            times = [t for t in self.times if t.sha256 == file.sha256]
            engines = list(dict.fromkeys([s.engine for s in scores] + [t.engine for t in times]))
            if not engines:
                rows.append(Row(file, None, None, {}))
            for engine in sorted(engines, key=lambda e: (e != BASE, e)):
                own = {t.place: t for t in times if t.engine == engine}
                found: list[Score | None] = [s for s in scores if s.engine == engine]
                rows += [Row(file, engine, score, own) for score in found or [None]]
        return rows

    def places(self) -> list[str]:
        """Where times were taken, the one with most of them first."""
        found = [t.place for t in self.times]
        return sorted(dict.fromkeys(found), key=lambda place: -found.count(place))

    def data_sets(self) -> list[str | None]:
        """Photos that scores were taken on, the one with most scores first."""
        found = [s.data for s in self.scores]
        return sorted(dict.fromkeys(found), key=lambda data: -found.count(data))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the folders of this machine."""
        bare = replace(self, scores=[replace(score, counts=None) for score in self.scores])
        value = asdict(bare)
        for item in value["files"]:
            del item["path"]
        for item in value["scores"]:
            del item["counts"]
        return {"kind": "tinymim.lineage"} | value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Lineage":
        """What :meth:`to_dict` gave."""
        rest = {f.name: value.get(f.name, []) for f in fields(cls) if f.name not in ("files", "scores", "times")}
        return cls(_of(File, value["files"]), _of(Score, value["scores"]), _of(Time, value["times"]), **rest)


def _of(kind: type[Kind], rows: list[dict[str, Any]]) -> list[Kind]:
    """Stored rows as objects; keys of other versions are left out, ``counts`` and ``path`` are never stored."""
    names = {item.name for item in fields(kind)} - {"counts", "path"}
    return [kind(**{key: value for key, value in row.items() if key in names}) for row in rows]


def _fill(known: File, more: File) -> None:
    """Complete a file's facts; a copy under another name does not rename it."""
    for item in fields(File):
        old, new = getattr(known, item.name), getattr(more, item.name)
        if item.name == "notes":
            known.notes += [note for note in new if note not in old]
        elif not known.given or old in (None, [], {}, False):
            setattr(known, item.name, new)
    known.given = True


def _score_key(score: Score) -> tuple[Any, ...]:
    return score.sha256, score.engine, score.mode, score.data


def _time_key(time: Time) -> tuple[Any, ...]:
    return time.sha256, time.engine, time.place


def data_key(classes: Iterable[str], images: int, labelled: Iterable[int]) -> str:
    """Hash of classes, number of photos and labelled pixels of each class: equal for scores of the same labels."""
    return hashlib.sha256(json.dumps([list(classes), images, list(map(int, labelled))]).encode()).hexdigest()[:12]
