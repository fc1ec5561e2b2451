"""Scores of a classifier on ImageNet, ImageNet-A, -R and -C: top-1, top-5, and the mean corruption error.

All scores are fractions. Legend: B = batch, K = the classifier's outputs, C = outputs that count.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinymim.data.imagenet import (
    CORRUPTIONS,
    SEVERITIES,
    ClassFolder,
    check_layout,
    read_class_folder,
    wnids,
)
from tinymim.data.photos import leave_signals_to_the_main_process, read_photo
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.progress import Progress, say

# AlexNet's errors, means over the five severities: Hendrycks & Dietterich 2019, github.com/hendrycks/robustness
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def top1(logits_BK: Tensor, labels_B: Tensor, columns_C: Tensor | None = None) -> Tensor:
    """Whether the label has the largest logit: bool (B,).

    Args:
        logits_BK: Logits.
        labels_B: Class ids, 0 .. K - 1.
        columns_C: Class ids that count; the others are removed first, as the authors of ImageNet-A and -R do.
    """
    return _among(1, logits_BK, labels_B, columns_C)


def top5(logits_BK: Tensor, labels_B: Tensor, columns_C: Tensor | None = None) -> Tensor:
    """Whether the label has one of the five largest logits: bool (B,), always true below six classes. As ``top1``."""
    return _among(5, logits_BK, labels_B, columns_C)


def _among(k: int, logits_BK: Tensor, labels_B: Tensor, columns_C: Tensor | None) -> Tensor:
    ids_C = torch.arange(logits_BK.shape[1]) if columns_C is None else columns_C
    best_Bk = ids_C[logits_BK[:, ids_C].topk(min(k, len(ids_C))).indices]
    return (best_Bk == labels_B[:, None]).any(1)


@dataclass(frozen=True)
class CorruptionScore:
    """Errors under corruption, fractions.

    Attributes:
        mce: Mean over the 15 corruptions of error / AlexNet's error; None if some are missing.
        error: Mean error over the same 15; None if some are missing.
        corruptions: Name -> {"error": mean over severities, "severity": the five errors, "ce": error / AlexNet's error,
            None for the four extra corruptions}.
    """

    mce: float | None
    error: float | None
    corruptions: dict[str, dict[str, Any]]


def corruption_errors(errors: Mapping[str, Sequence[float]], *, allow_partial: bool = False) -> CorruptionScore:
    """The mean corruption error (mCE) and its parts.

    Args:
        errors: Corruption -> its top-1 errors at severities 1 to 5, fractions.
        allow_partial: Accept fewer than the 15 corruptions; mCE is None then.

    Raises:
        DataError: missing corruptions, an unknown one, or not five fractions.

    Source: Hendrycks & Dietterich 2019 (arXiv 1903.12261), section 4.1: CE = sum of the errors over severities /
    sum of AlexNet's; mCE is the mean of CE over 15 corruptions.
    """
    missing = [name for name in ALEXNET if name not in errors]
    if missing and not allow_partial:
        raise DataError(
            f"no mCE without {', '.join(missing)}",
            f"it is the mean over {len(ALEXNET)} corruptions",
            "evaluate them too, or allow a partial result (allow_partial=True)",
        )
    for name, values in errors.items():
        if name not in ALEXNET and name not in CORRUPTIONS["extra"]:
            raise DataError(f"no corruption {name!r}", f"the corruptions are {', '.join(ALEXNET)}", "correct the name")
        if len(values) != len(SEVERITIES) or not all(0 <= value <= 1 for value in values):
            raise DataError(
                f"the errors of {name} are {list(values)}",
                "five fractions are needed, one per severity",
                "give five numbers between 0 and 1",
            )
    corruptions = {}
    for name in [name for name in (*ALEXNET, *CORRUPTIONS["extra"]) if name in errors]:
        error = float(np.mean(errors[name]))
        ce = error / ALEXNET[name] if name in ALEXNET else None
        corruptions[name] = {"error": error, "severity": [float(value) for value in errors[name]], "ce": ce}
    if missing:
        return CorruptionScore(None, None, corruptions)
    mce, error = (float(np.mean([corruptions[name][key] for name in ALEXNET])) for key in ("ce", "error"))
    return CorruptionScore(mce, error, corruptions)


def evaluate_folders(
    predict: Callable[[Tensor], Tensor],
    *,
    imagenet: str | Path | None = None,
    a: str | Path | None = None,
    r: str | Path | None = None,
    c: str | Path | None = None,
    transform: Callable[[Image.Image], Tensor],
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a classifier on labelled folders. All layouts are checked before the first photo is read.

    Args:
        predict: Normalised photos (B, 3, H, W) on the CPU -> logits (B, K), on any device; in evaluation mode.
        imagenet: Class folder; with ``classes`` any folder of those classes.
        a: ImageNet-A, scored among its 200 classes.
        r: ImageNet-R, likewise.
        c: ImageNet-C. Its photos are already 224 x 224 and its authors only crop them: use a separate call if
            ``transform`` resizes.
        transform: RGB photo -> normalised (3, H, W).
        classes: Names of the classifier's outputs; None: the 1000 of ImageNet.
        batch_size: Photos per call of ``predict``.
        workers: Data-loading processes.
        limit: Most photos of each set (ImageNet-C: of each severity), evenly spread.
        progress: Show a progress line, and print warnings.

    Returns:
        ``{"imagenet": S, "imagenet-a": S, "imagenet-r": S, "imagenet-c": {"mce", "error", "corruptions"}}`` for the
        given sets, S = {"top1", "top5"}, the rest as in :class:`CorruptionScore`; each also with "photos" (scored),
        "skipped" (damaged files) and "warnings" (differences from the official set). It can be written as JSON.

    Raises:
        ConfigError: no folder, outputs other than ``classes``, or A, R, C for a classifier of other classes.
        CheckpointError: logits are NaN.
        DataError: a folder with another layout, or no photo of it can be read.
    """
    folders = {"imagenet": imagenet, "imagenet-a": a, "imagenet-r": r, "imagenet-c": c}
    chosen = {kind: Path(folder) for kind, folder in folders.items() if folder is not None}
    if not chosen:
        raise ConfigError("nothing to evaluate", "no folder was given", f"give one of {', '.join(folders)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError("no photos to score", f"batch_size {batch_size}, limit {limit}", "use numbers above 0")
    names = wnids("imagenet") if classes is None else tuple(classes)
    own_classes = names != wnids("imagenet")
    if own_classes and set(chosen) != {"imagenet"}:
        raise ConfigError(
            f"this classifier cannot be scored on {', '.join(kind for kind in chosen if kind != 'imagenet')}",
            f"they need ImageNet's 1000 classes in their order, and it has {len(names)} other classes",
            "score it on a folder of its own classes, or fine-tune on ImageNet first",
        )
    reports = {} if own_classes else {kind: check_layout(folder, kind) for kind, folder in chosen.items()}
    if progress:
        for kind, report in reports.items():
            for warning in report.warnings:
                say(f"warning: {kind}: {warning}")

    def score(title: str, folder: Path, kind: str) -> dict[str, Any]:
        data = read_class_folder(folder, names)
        columns_C = None
        if kind in ("imagenet-a", "imagenet-r"):
            columns_C = torch.tensor([names.index(name) for name in wnids(kind)])
        loader = DataLoader(
            _Photos(data, transform, limit),
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        return _score(predict, loader, columns_C, len(names), Progress(title, len(loader)) if progress else None)

    result: dict[str, Any] = {}
    for kind, folder in chosen.items():
        if kind != "imagenet-c":
            result[kind] = score(kind, folder, kind)
        else:
            scores = {
                name: [score(f"{kind} {name}/{s}", place / str(s), kind) for s in SEVERITIES]
                for name, place in reports[kind].corruptions.items()
            }
            errors = {name: [1 - s["top1"] for s in five] for name, five in scores.items()}
            every = [s for five in scores.values() for s in five]
            result[kind] = asdict(corruption_errors(errors, allow_partial=True))
            result[kind]["photos"] = sum(s["photos"] for s in every)
            result[kind]["skipped"] = [path for s in every for path in s["skipped"]]
        result[kind]["warnings"] = list(reports[kind].warnings) if kind in reports else []
    return result


@torch.inference_mode()
def _score(
    predict: Callable[[Tensor], Tensor],
    loader: "DataLoader[Any]",
    columns_C: Tensor | None,
    outputs: int,
    line: Progress | None,
) -> dict[str, Any]:
    """{"top1", "top5", "photos", "skipped"} of one folder."""
    right1, right5, photos, skipped = 0, 0, 0, []
    wait_start = time.monotonic()
    for step, (images_B3HW, labels_B, damaged) in enumerate(loader):
        waited = time.monotonic() - wait_start
        skipped += damaged
        if damaged and line is not None:
            say("\n" + "\n".join(f"warning: skipped damaged photo {path}" for path in damaged))
        if len(labels_B):
            logits_BK = predict(images_B3HW).float().cpu()
            _check_logits(logits_BK, len(labels_B), outputs)
            right1 += int(top1(logits_BK, labels_B, columns_C).sum())
            right5 += int(top5(logits_BK, labels_B, columns_C).sum())
            photos += len(labels_B)
        if line is not None and photos:
            line.update(step + 1, images=len(labels_B), waited=waited, top1=right1 / photos)
        wait_start = time.monotonic()
    if not photos:
        raise DataError(
            f"no photo of {loader.dataset.root} can be read",  # type: ignore[attr-defined]
            f"all {len(skipped)} that were tried are damaged",
            "unpack the photos again",
        )
    if line is not None:
        line.close(f"{photos} photos, top-1 {100 * right1 / photos:.2f}%")
    return {"top1": right1 / photos, "top5": right5 / photos, "photos": photos, "skipped": skipped}


def _check_logits(logits_BK: Tensor, photos: int, outputs: int) -> None:
    if logits_BK.shape != (photos, outputs):
        raise ConfigError(
            f"the classifier returns {tuple(logits_BK.shape)} for {photos} photos",
            f"{(photos, outputs)} is needed: {outputs} classes",
            "name its classes in the order of its outputs (classes), and give a folder of those classes",
        )
    if logits_BK.isnan().any():
        raise CheckpointError(
            "the classifier returns NaN",
            "its weights are broken, or half precision overflows",
            "try another checkpoint, or full precision",
        )


class _Photos(Dataset[tuple[Tensor | None, int, str]]):
    """(transformed photo, label, path); None for a photo that cannot be read."""

    def __init__(self, data: ClassFolder, transform: Callable[[Image.Image], Tensor], limit: int | None) -> None:
        count = len(data.files)
        taken = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
        self.files, self.labels = [str(data.files[i]) for i in taken], [int(data.labels[i]) for i in taken]
        self.root, self.transform = data.root, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor | None, int, str]:
        image = read_photo(self.files[i])
        if image is None:
            return None, self.labels[i], self.files[i]
        return self.transform(image), self.labels[i], self.files[i]


def _collate(samples: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """Photos (B, 3, H, W), labels (B,), and the files that could not be read."""
    good = [(image, label) for image, label, _ in samples if image is not None]
    images_B3HW = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return (
        images_B3HW,
        torch.tensor([label for _, label in good]),
        [path for image, _, path in samples if image is None],
    )
