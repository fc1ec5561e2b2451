"""Exact mean intersection over union: one int64 confusion matrix over all validation pixels at original size."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.evaluator import BaseMetric
from mmseg.registry import METRICS

from tinymim.confusion import class_counts, matrix_of_ids, scores
from tinymim.data.folders import IGNORED
from tinymim.errors import CheckFailed
from tinymim.files import write_json, write_text
from tinymim.progress import say

IDS = 256  # of labels and of predictions


@dataclass
class SegResult:
    """Segmentation quality on a validation set. All scores are fractions from 0 to 1.

    Attributes:
        miou: Mean IoU over classes that occur in the labels or the predictions.
        macc: Mean pixel accuracy over classes that occur in the labels.
        aacc: Share of correct pixels.
        class_iou: IoU per class, NaN for a class that never occurs.
        classes: Names of the classes.
        constant_miou: mIoU of the best constant prediction on the same labels.
        confusion: int64 (classes, classes), rows = label, columns = prediction.
        images: Number of photos.
        files: Paths a run wrote: work_dir, segmentor, metrics (training only).
    """

    miou: float
    macc: float
    aacc: float
    class_iou: list[float]
    classes: list[str]
    constant_miou: float
    images: int
    confusion: np.ndarray = field(repr=False)
    files: dict[str, str] = field(default_factory=dict)
    sha256: str = ""

    @classmethod
    def from_confusion(cls, confusion: np.ndarray, classes: Sequence[str], images: int) -> "SegResult":
        """Scores of a confusion matrix (rows = label, columns = prediction)."""
        return cls(**scores(*class_counts(confusion)), classes=list(classes), images=images, confusion=confusion)

    @property
    def work_dir(self) -> Path:
        """Run folder of the training."""
        return Path(self.files["work_dir"])

    @property
    def segmentor(self) -> Path:
        """The ``segmentor.pth`` the training wrote."""
        return Path(self.files["segmentor"])

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl`` of the training."""
        return Path(self.files["metrics"])

    @property
    def best(self) -> Path:
        """The weights of the best validation: ``best_segmentor.pth``, or ``segmentor.pth`` if it was the last."""
        return Path(self.files.get("best", self.files["segmentor"]))

    def summary(self) -> str:
        """One line."""
        return (
            f"mIoU {100 * self.miou:.2f} %  (best constant {100 * self.constant_miou:.2f} %)  "
            f"mAcc {100 * self.macc:.2f} %  aAcc {100 * self.aacc:.2f} %  {self.images} photos"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {
            "kind": "tinymim.eval",
            "sha256": self.sha256,
            "engine": "PyTorch",
            "mIoU": _plain(self.miou),
            "mAcc": _plain(self.macc),
            "aAcc": _plain(self.aacc),
            "constant_mIoU": _plain(self.constant_miou),
            "images": self.images,
            "class_IoU": dict(zip(self.classes, map(_plain, self.class_iou), strict=True)),
            "confusion": self.confusion.tolist(),
            "files": self.files,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        if path is not None:
            write_json(path, self.to_dict())
        return json.dumps(self.to_dict(), indent=1)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Markdown table of classes under the summary; written to ``path`` if given."""
        rows = [
            f"| {name} | {'absent' if np.isnan(iou) else f'{100 * iou:.2f}'} |"
            for name, iou in zip(self.classes, self.class_iou, strict=True)
        ]
        text = "\n".join([self.summary(), "", "| class | IoU % |", "|---|---|", *rows]) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def print(self) -> None:
        """Print classes and summary."""
        width = max(map(len, self.classes))
        for name, iou in zip(self.classes, self.class_iou, strict=True):
            print(f"  {name.ljust(width)}  {'absent' if np.isnan(iou) else f'{100 * iou:6.2f} %'}")
        print(self.summary())


def _plain(value: float) -> float | None:
    """NaN is no JSON."""
    return None if np.isnan(value) else value


@METRICS.register_module()
class SegMetric(BaseMetric):
    """``mIoU``, ``mAcc``, ``aAcc`` and ``constant_mIoU`` (fractions) for MMEngine's loops; ``last`` holds the result.

    Several processes must see every photo once: use ``DefaultSampler`` with ``round_up=False``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(prefix="seg", **kwargs)
        self.prefix = None  # MMEngine warns if none is given, but the names need no prefix
        self.last: SegResult | None = None
        self.order: np.ndarray | None = None  # uint8 (256,): the model's class id -> the dataset's
        self.results: list[Any] = []
        self._clear()

    def _clear(self) -> None:
        self.counts: torch.Tensor | None = None  # int64 (256 * 256,) of all pairs of label and prediction
        self.images = 0

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Count the pixels of a batch: ``pred_sem_seg`` and ``gt_sem_seg`` of (1, H, W) at original size, ids to 255.

        They are counted where they are: a pair of ids is one number of 16 bits.
        """
        for sample in data_samples:
            label, guess = (sample[key]["data"].flatten().to(torch.int32) for key in ("gt_sem_seg", "pred_sem_seg"))
            counts = torch.bincount(label * IDS + guess.to(label.device), minlength=IDS * IDS)
            self.counts = counts if self.counts is None else self.counts + counts
            self.images += 1

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over processes and compute the scores.

        Raises:
            CheckFailed: a photo was counted twice or not at all.
            DataError: a label or a prediction outside the classes.
        """
        assert self.dataset_meta is not None
        count = len(self.dataset_meta["classes"])
        total = torch.zeros(count * count + 1, dtype=torch.int64)
        if self.counts is not None:
            counts = self.counts.cpu().numpy().reshape(IDS, IDS)
            total[:-1] = torch.from_numpy(matrix_of_ids(counts, count, IGNORED, order=self.order)).flatten()
        total[-1] = self.images
        self._clear()
        from mmengine.device import get_device

        total = total.to(get_device())
        all_reduce(total)
        total = total.cpu()
        if int(total[-1]) != size:
            raise CheckFailed(
                f"validation counted {int(total[-1])} photos of {size}",
                "the sampler gave some photos to two processes",
                "set val_dataloader.sampler.round_up=False",
            )
        matrix = total[:-1].reshape(count, count).numpy()
        self.last = SegResult.from_confusion(matrix, self.dataset_meta["classes"], size)
        if is_main_process():
            say(self.last.summary())
        return {
            "mIoU": self.last.miou,
            "mAcc": self.last.macc,
            "aAcc": self.last.aacc,
            "constant_mIoU": self.last.constant_miou,
        }

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Unused: :meth:`evaluate` sums confusion matrices instead of collecting results."""
        raise NotImplementedError
