"""Pseudo-labels by a segmentor .onnx file. Needs numpy, Pillow and onnxruntime only."""

from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.pseudo_labels import PseudoLabels, check_request, write_pseudo_labels
from tinymim.errors import ConfigError
from tinymim.progress import say
from tinymim_export.runtime.predictor import Predictor, read_photo


def label_photos(
    photos: str | Path, file: str | Path, out: str | Path, *, min_confidence: float = 0.0, **options: Any
) -> PseudoLabels:
    """Label photos by an exported segmentor: a labelled folder for ``train_segmentor(pseudo=...)``.

    Args:
        photos: A photo, a folder, a pattern or shards.
        file: The .onnx file.
        out: A new folder.
        min_confidence: Pixels whose class has a smaller probability are ignored (255).
        options: Options of :class:`tinymim_export.runtime.predictor.Predictor`.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    check_request(photos, out, min_confidence)
    labeller = _Labeller(Predictor(file, **options))
    if min_confidence and labeller.decides:
        raise ConfigError(
            f"{labeller.file.name} gives masks, no probabilities",
            "the decision is inside the file",
            "leave --min-confidence out, or export with --output logits",
        )
    result = write_pseudo_labels(labeller, photos, out, min_confidence=min_confidence)
    for note in labeller.predictor.notes:
        say(f"note: {note}")
    return result


class _Labeller:
    """See :class:`tinymim.data.pseudo_labels.Labeller`."""

    at_once = 1

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, engine = predictor, predictor.engine
        self.file, self.sha256, self.palette = engine.path, engine.sha256, predictor.palette
        first = engine.outputs[0]
        self.decides = "float" not in first.dtype
        channels = first.shape[1] if len(first.shape) == 4 and not self.decides else None
        if predictor.classes is None and not isinstance(channels, int):
            raise ConfigError(
                f"{engine.path.name} does not say its classes", "it has no tinymim.classes", "export it again"
            )
        self.classes = predictor.classes or [f"class {i}" for i in range(max(int(channels or 0), 2))]
        self.settings = {
            "runtime": engine.label,
            "mode": "stretched" if predictor.stretch else predictor.mode,
            "mean": predictor.contract.get("mean"),
            "std": predictor.contract.get("std"),
        }

    def read(self, path: Path) -> np.ndarray:
        """The photo, uint8 (H, W, 3)."""
        return read_photo(path)

    def predict(self, photos: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Ids and their probabilities."""
        return [self.predictor.mask_and_confidence(photo) for photo in photos]
