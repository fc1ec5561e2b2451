"""mIoU of the file itself: every pixel of labelled photos at their own size, whole or in windows. No PyTorch.

Equal to ``tinymim segment --test`` on the PyTorch model the file was made from, up to the file's own arithmetic.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.confusion import class_counts, confusion_matrix, scores
from tinymim.data.folders import IGNORED, Layout, Pair, read_layout
from tinymim.data.label_files import save_mask, wrong_size
from tinymim.errors import ConfigError, DataError
from tinymim.files import environment, write_json, write_text
from tinymim.progress import Progress, say
from tinymim_export.runtime.engines import Engine
from tinymim_export.runtime.engines.base import DEFAULT, renamed
from tinymim_export.runtime.predictor import Predictor, read_photo
from tinymim_export.tables import markdown_table, text_table


@dataclass
class EvalResult:
    """Segmentation quality of a file. All scores are fractions from 0 to 1.

    Attributes:
        file: The .onnx file.
        sha256: Of the file.
        engine: Runtime, provider and compute type, e.g. "openvino cpu bf16".
        mode: "whole", "slide" or "stretched".
        miou: Mean IoU over classes that occur in the labels or the predictions.
        macc: Mean pixel accuracy over classes that occur in the labels.
        aacc: Share of right pixels.
        class_iou: IoU per class, NaN where a class never occurs.
        constant_miou: mIoU of the best constant prediction on the same labels.
        images: Photos scored.
        confusion: int64 (C, C), rows = label, columns = prediction.
        right_IC: int64 (photos, C): pixels of each class predicted right; with the next two, all a bootstrap needs.
        labelled_IC: int64 (photos, C): pixels of each class in the labels.
        predicted_IC: int64 (photos, C): pixels of each class in the predictions, ignored ones left out.
        names: Photos, below the split's folder, without the suffix.
        notes: What differs from the file's contract, in sentences.
    """

    file: str
    sha256: str
    engine: str
    mode: str
    miou: float
    macc: float
    aacc: float
    class_iou: list[float]
    classes: list[str]
    constant_miou: float
    images: int
    confusion: np.ndarray = field(repr=False)
    right_IC: np.ndarray = field(repr=False)
    labelled_IC: np.ndarray = field(repr=False)
    predicted_IC: np.ndarray = field(repr=False)
    names: list[str] = field(repr=False)
    data: str
    split: str
    seconds: float
    notes: list[str]
    environment: dict[str, Any] = field(repr=False)

    def summary(self) -> str:
        """One line."""
        return (
            f"mIoU {100 * self.miou:.2f} %  (best constant {100 * self.constant_miou:.2f} %)  "
            f"mAcc {100 * self.macc:.2f} %  aAcc {100 * self.aacc:.2f} %  {self.images} photos"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        return {
            "kind": "tinymim.eval",
            "file": self.file,
            "sha256": self.sha256,
            "engine": self.engine,
            "mode": self.mode,
            "mIoU": _plain(self.miou),
            "mAcc": _plain(self.macc),
            "aAcc": _plain(self.aacc),
            "constant_mIoU": _plain(self.constant_miou),
            "images": self.images,
            "class_IoU": dict(zip(self.classes, map(_plain, self.class_iou), strict=True)),
            "confusion": self.confusion.tolist(),
            "photos": {
                "names": self.names,
                "right": self.right_IC.tolist(),
                "labelled": self.labelled_IC.tolist(),
                "predicted": self.predicted_IC.tolist(),
            },
            "data": self.data,
            "split": self.split,
            "seconds": self.seconds,
            "notes": self.notes,
            "environment": self.environment,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        if path is not None:
            write_json(path, self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Summary and classes; written to ``path`` if given."""
        head = f"`{Path(self.file).name}` ({self.engine}, {self.mode}, sha256 {self.sha256[:12]}): {self.summary()}"
        text = "\n".join([head, "", markdown_table(self._rows()), *(f"- {note}" for note in self.notes)])
        text = text.rstrip() + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def print(self) -> None:
        """Classes, notes and summary."""
        print(text_table(self._rows()))
        for note in self.notes:
            print(f"note: {note}")
        print(
            f"{Path(self.file).name} ({self.engine}, {self.mode}): {self.summary()} ({self.seconds:.0f} s)", flush=True
        )

    def _rows(self) -> list[list[str]]:
        shares = self.labelled_IC.sum(0) / max(int(self.labelled_IC.sum()), 1)
        return [["class", "IoU %", "pixels %"]] + [
            [name, "absent" if np.isnan(iou) else f"{100 * iou:.2f}", f"{100 * share:.2f}"]
            for name, iou, share in zip(self.classes, self.class_iou, shares, strict=True)
        ]


@renamed(precision="compute_type")
def evaluate(
    file: str | Path | None,
    data: str | Path,
    *,
    split: str = "val",
    mode: str | None = None,
    resize_to_file: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    runtime: str = DEFAULT,
    provider: str = "cpu",
    compute_type: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
    masks: str | Path | None = None,
    engine: Engine | None = None,
    quiet: bool = False,
) -> EvalResult:
    """Score a segmentor file on labelled photos.

    Args:
        file: The .onnx file; None where ``engine`` is given.
        data: Labelled folder in ADE20K layout.
        split: "val" or "train".
        mode: "whole" or "slide"; None takes the file's contract.
        resize_to_file: Stretch photos to the fixed size of the file (said in the result).
        mean: Normalisation of files without metadata.
        std: The same.
        runtime: One of :data:`tinymim_export.runtime.engines.RUNTIMES`: "onnxruntime", "openvino".
        provider: "cpu", "cuda" or "tensorrt".
        compute_type: What OpenVINO computes in, "f32" or "bf16" (``precision`` in 0.1).
        threads: CPU threads.
        limit: Score this many photos, evenly spread over the split; None scores all.
        ignore_label: Id or ids to ignore, for folders without ``dataset.json``.
        reduce_zero_label: Whether id 0 is "no class", for folders without ``dataset.json``.
        masks: Folder for every predicted mask, ``<photo>.png`` at the photo's size.
        engine: An opened file to use.
        quiet: No progress line.

    Raises:
        ConfigError: options or a file that cannot do this.
        DataError: a folder, photo or label that is missing or wrong, or classes that do not match.
    """
    if split not in ("val", "train"):
        raise ConfigError(f"split {split!r} is unknown", "the splits are val and train", "choose one of them")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no photo", "it counts the photos to score", "e.g. --limit 100")
    options = {} if engine else dict(runtime=runtime, provider=provider, compute_type=compute_type, threads=threads)
    predictor = Predictor(file, mode=mode, resize_to_file=resize_to_file, mean=mean, std=std, engine=engine, **options)
    layout = read_layout(data, ignore_label=ignore_label, reduce_zero_label=reduce_zero_label)
    if layout.source != "dataset.json" and not quiet:
        say(layout)
    if masks is not None and Path(masks).resolve().is_relative_to(layout.root.resolve()):
        raise ConfigError(
            f"--masks {masks} lies in the data folder",
            "masks would be mixed with its photos or replace its labels",
            "choose a folder of its own",
        )
    pairs = layout.need(split)
    if limit is not None and limit < len(pairs):
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    order, remark = (None, None) if predictor.classes is None else layout.match(predictor.name, predictor.classes)
    began, count = time.monotonic(), len(layout.classes)
    names, margins, total = [], [], np.zeros((count, count), np.int64)
    progress = None if quiet else Progress("eval", len(pairs))
    for i, pair in enumerate(pairs):
        photo, label = _read(pair, layout)
        mask = predictor.mask(photo)
        if predictor.channels not in (None, 1, count):
            layout.match(predictor.name, [f"class {i}" for i in range(predictor.channels or 0)])  # raises
        if order is not None:
            mask = order[mask]
        matrix = confusion_matrix(label, mask, count, IGNORED, predictor.name)
        total += matrix
        margins.append(np.stack(class_counts(matrix)))
        names.append(layout.name(split, pair[0]))
        if masks is not None:
            save_mask(mask, Path(masks) / f"{names[-1]}.png", layout.palette)
        if progress is not None:
            progress.update(i + 1, images=1)
    if progress is not None:
        progress.close()
    notes = list(predictor.notes)
    if remark is not None:
        notes.append(remark)
    if len(pairs) < len(getattr(layout, split)):
        notes.append(f"--limit: {len(pairs)} of {len(getattr(layout, split))} photos, evenly spread")
    right, labelled, predicted = np.stack(margins, axis=1)
    if not labelled.any():
        raise DataError(
            f"no pixel of the labels of these {len(pairs)} photos counts",
            "all of them are ignored",
            "score more photos (--limit), or correct the labels",
        )
    return EvalResult(
        file=str(predictor.engine.path),
        sha256=predictor.engine.sha256,
        engine=predictor.engine.label,
        mode="stretched" if predictor.stretch else predictor.mode,
        **scores(right.sum(0), labelled.sum(0), predicted.sum(0)),
        classes=list(layout.classes),
        images=len(pairs),
        confusion=total,
        right_IC=right,
        labelled_IC=labelled,
        predicted_IC=predicted,
        names=names,
        data=str(data),
        split=split,
        seconds=time.monotonic() - began,
        notes=notes,
        environment=environment(),
    )


def _read(pair: Pair, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    photo, label = read_photo(pair[0]), layout.read_label(pair[1])
    if label.shape != photo.shape[:2]:
        raise wrong_size(pair[1], label.shape[::-1], photo.shape[1::-1])
    return photo, label


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value
