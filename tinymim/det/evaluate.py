"""Average precision of a detector, as COCO defines it (by pycocotools)."""

import contextlib
import io
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymim.data.photos import to_tensor
from tinymim.det.coco import Coco, open_labelled, tools
from tinymim.det.detector import Detector
from tinymim.errors import DataError
from tinymim.files import write_json
from tinymim.progress import Progress


@dataclass
class DetectionScores:
    """Average precision in percent: over IoU 0.50 to 0.95, at 0.50 and at 0.75; of masks None without them.

    Attributes:
        box_ap: Of boxes; likewise ``box_ap50``, ``box_ap75``.
        mask_ap: Of masks; likewise ``mask_ap50``, ``mask_ap75``.
        class_ap: Class -> AP of its boxes; None where no photo has one.
        photos: Photos that were scored.
        damaged: Photos that cannot be read; they count as if nothing was found.
        seconds: For all photos.
    """

    box_ap: float
    box_ap50: float
    box_ap75: float
    mask_ap: float | None
    mask_ap50: float | None
    mask_ap75: float | None
    class_ap: dict[str, float | None]
    photos: int
    damaged: int
    seconds: float

    def print(self) -> None:
        """Two lines at most."""
        print(
            f"boxes: AP {self.box_ap:.1f} %, AP50 {self.box_ap50:.1f}, AP75 {self.box_ap75:.1f}, {self.photos} photos"
        )
        if self.mask_ap is not None:
            print(f"masks: AP {self.mask_ap:.1f} %, AP50 {self.mask_ap50:.1f}, AP75 {self.mask_ap75:.1f}")
        if self.damaged:
            print(f"warning: {self.damaged} damaged photo(s) count as if nothing was found")

    def to_json(self, path: str | Path) -> None:
        """Write all values."""
        write_json(Path(path), {"kind": "tinymim.detection", **asdict(self)})


@torch.no_grad()
def evaluate_detector(model: Detector, data: Coco) -> DetectionScores:
    """Score a detector, one photo at a time.

    Args:
        model: The detector; put into evaluation mode, and back.
        data: Labelled photos with its classes.

    Raises:
        DataError: no object to find.
        TinyMIMError: pycocotools is not installed.
    """
    mask = tools()
    if not any(item.labels for item in data.items):
        raise DataError(f"{data.file} has no objects", "there is nothing to find", "name a file with annotations")
    masks = bool(model.config["masks"]) and data.with_masks
    device, training = next(model.parameters()).device, model.training
    model.eval()
    ids = {label: category for category, label in data.categories.items()}
    found: list[dict[str, Any]] = []
    damaged, began = 0, time.monotonic()
    line = Progress("score", len(data.items))
    for done, item in enumerate(data.items, 1):
        photo = open_labelled(item)
        if photo is None:
            damaged += 1
            continue
        (out,) = model([to_tensor(photo).to(device).float() / 255])
        scale = torch.tensor([item.size[1] / photo.width, item.size[0] / photo.height] * 2)
        boxes = out["boxes"].cpu() * scale
        for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
            category, score = ids[int(out["labels"][i])], float(out["scores"][i])
            box = [left, top, right - left, bottom - top]
            found.append({"image_id": item.id, "category_id": category, "score": score, "bbox": box})
            if masks:
                found[-1]["segmentation"] = _run_lengths(mask, out["masks"][i, 0] >= 0.5, item.size)
        line.update(done, images=1)
    line.close(f"{len(data.items)} photos, {len(found)} objects found")
    model.train(training)
    (ap, ap50, ap75), classes = _average_precision(data, found, "bbox")
    of_masks = _average_precision(data, found, "segm")[0] if masks else (None, None, None)
    names = dict(zip(data.classes, classes, strict=True))
    seconds = time.monotonic() - began
    return DetectionScores(
        ap, ap50, ap75, of_masks[0], of_masks[1], of_masks[2], names, len(data.items), damaged, seconds
    )


def _run_lengths(mask: Any, mask_HW: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """A mask in the size that the annotations have."""
    values = mask_HW.cpu()
    if tuple(values.shape) != size:
        values = torch.nn.functional.interpolate(values[None, None].float(), size=size)[0, 0] > 0
    found = mask.encode(np.asfortranarray(values.numpy().astype(np.uint8)))
    return {**found, "counts": found["counts"].decode("ascii")}


def _average_precision(
    data: Coco, found: list[dict[str, Any]], kind: str
) -> tuple[tuple[float, float, float], list[float | None]]:
    """AP, AP50 and AP75 in percent, and AP of each class."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return (0.0, 0.0, 0.0), [0.0] * len(data.classes)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        truth = COCO()
        given = enumerate(data.content["annotations"], 1)
        notes = [{"iscrowd": 0, "area": n["bbox"][2] * n["bbox"][3], **n, "id": number} for number, n in given]
        truth.dataset = {"info": {}, **data.content, "annotations": notes}
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(found), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision_TRKAM = scorer.eval["precision"]  # IoU, recall, class, area, detections
    classes = []
    for k in range(len(data.classes)):
        values = precision_TRKAM[:, :, k, 0, -1]
        classes.append(float(100 * values[values > -1].mean()) if (values > -1).any() else None)
    ap, ap50, ap75 = (max(float(100 * value), 0.0) for value in scorer.stats[:3])
    return (ap, ap50, ap75), classes
