"""Pseudo-labels by a ``segmentor.pth``: photos through its validation pipeline, its windows and its decision."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope

from tinymim import compat
from tinymim.data.pseudo_labels import PseudoLabels, check_request, write_pseudo_labels
from tinymim.errors import ConfigError
from tinymim.files import sha256_file
from tinymim.models.weight_files import weights_file
from tinymim.seg.config import building
from tinymim.seg.inference import PHOTOS, predict
from tinymim.seg.segmentor import load_segmentor

LOADING = ("LoadPhoto", "LoadImageFromFile", "LoadLabel", "LoadAnnotations", "GenerateEdge")


def label_photos(
    photos: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    min_confidence: float = 0.0,
    config: str | Path | None = None,
    device: str | None = None,
) -> PseudoLabels:
    """Label photos by a segmentor: a labelled folder for ``train_segmentor(pseudo=...)``.

    Args:
        photos: A photo, a folder, a pattern or shards.
        checkpoint: ``segmentor.pth`` or ``iter_N.pth``; of an exported file
            :func:`tinymim_export.runtime.label.label_photos`.
        out: A new folder.
        min_confidence: Pixels whose class has a smaller probability are ignored (255).
        config: File or name; None: the one stored in ``checkpoint``.
        device: "cpu", "cuda", "cuda:N"; default: a GPU if there is one.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    check_request(photos, out, min_confidence)
    return write_pseudo_labels(_Labeller(checkpoint, config, device), photos, out, min_confidence=min_confidence)


class _Labeller:
    """See :class:`tinymim.data.pseudo_labels.Labeller`."""

    at_once = PHOTOS

    def __init__(self, checkpoint: str | Path, config: str | Path | None, device: str | None) -> None:
        checkpoint = weights_file(checkpoint)
        model, cfg = load_segmentor(checkpoint, config)
        names: Any = model.dataset_meta
        self.file, self.sha256 = checkpoint, sha256_file(checkpoint)
        self.classes = names["classes"] or [f"class {i}" for i in range(int(model.num_classes))]  # type: ignore[arg-type]
        self.palette = names["palette"]
        steps = ((cfg.get("val_dataloader") or {}).get("dataset") or {}).get("pipeline")
        if not steps:
            raise ConfigError(
                f"{checkpoint} does not say how photos are prepared",
                "its config has no val_dataloader.dataset.pipeline",
                "give a config that has, too: --config FILE",
            )
        steps = [step for step in steps if str(step["type"]).rpartition(".")[2] not in LOADING]
        init_default_scope("mmseg")
        with building("validation pipeline"):
            self.pipeline = Compose([dict(type="LoadPhoto"), *steps])
        self.settings = {"runtime": "PyTorch", "pipeline": steps, "test_cfg": cfg.model.get("test_cfg")}
        self.model = model.to(compat.use_device(device))

    def read(self, path: Path) -> dict[str, Any]:
        """The photo as the network sees it."""
        found: dict[str, Any] = self.pipeline(dict(img_path=str(path), seg_fields=[]))
        return found

    @torch.inference_mode()
    def predict(self, photos: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Ids and their probabilities."""
        batch = {key: [photo[key] for photo in photos] for key in ("inputs", "data_samples")}
        samples = predict(self.model, batch, confidence=True)
        return [
            (_pixels(sample.pred_sem_seg).astype(np.uint8), _pixels(sample.confidence).astype(np.float32))
            for sample in samples
        ]


def _pixels(field: Any) -> np.ndarray:
    """(1, H, W) of a sample as (H, W)."""
    found: np.ndarray = field.data[0].cpu().numpy()
    return found
