"""Files of candidates: a backbone, or a classifier where the model has a head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.models import model_from_checkpoint, save_student
from tinymim.models.classifier import Classifier, from_heads, save_classifier, stored_heads
from tinymim.models.formats import Checkpoint


def open_model(file: str | Path) -> tuple[Any, Sequence[str] | None]:
    """The classifier of a file, or its backbone if it has no head; and the names of its classes.

    Raises:
        CheckpointError: see :func:`tinymim.models.model_from_checkpoint`.
    """
    model, checkpoint = model_from_checkpoint(file, say=False)
    return with_heads(model, checkpoint), checkpoint.meta.get("classes")


def with_heads(model: Any, checkpoint: Checkpoint) -> Any:
    """A classifier of a backbone and the heads of its file; the backbone where the file has none."""
    heads = stored_heads(model, checkpoint)
    return model if heads is None else from_heads(model, heads).eval()


def save_model(model: Any, file: Path, classes: Sequence[str] | None, meta: dict[str, Any] | None = None) -> None:
    """Write a backbone or classifier.

    Args:
        model: It.
        file: To write, atomically.
        classes: Names of a classifier's classes, if they are known.
        meta: Added to what the file says of itself.
    """
    if isinstance(model, Classifier):
        save_classifier(model, file, classes, meta)
    else:
        save_student(model, file, meta)
