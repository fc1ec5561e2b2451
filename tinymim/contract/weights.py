"""What is contracted, and its files: backbones, or classifiers where the model has a head."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinymim.contract.factors import Config, Factor, factors, smallest, written_out
from tinymim.contract.inherit import inherit
from tinymim.models import model_from_checkpoint, save_student
from tinymim.models.backbone import from_config
from tinymim.models.classifier import Classifier, from_heads, save_classifier, stored_heads
from tinymim.models.formats import Checkpoint
from tinymim.schema import parse


class Kind(Protocol):
    """What a search can make smaller: how it is described, counted, cut and stored.

    Attributes:
        config: The start, with every factor written out.
        start: The start itself, with its weights.
        file: Name of a file that holds one.
        about: What the counts are of, in words.
    """

    config: Config
    start: Any
    file: str
    about: str

    def factors(self, config: Config) -> list[Factor]: ...

    def smallest(self, config: Config) -> Config: ...

    def count(self, config: Config) -> tuple[int, int]:
        """Parameters and multiply-adds of one image; nothing is computed."""

    def inherit(self, config: Config, parent: Any, parent_config: Config) -> Any:
        """A smaller model with the weights of a larger one."""

    def open(self, file: Path) -> Any:
        """The model of a file."""

    def save(self, model: Any, file: Path, meta: dict[str, Any] | None = None) -> None:
        """Write a model, atomically; ``meta`` is added to what the file says of itself."""


class Students:
    """Backbones, or classifiers on them; the counts are those of the backbone, of an image of its ``img_size``.

    Args:
        start: The model to shrink.
        classes: Names of a classifier's classes.
    """

    file, about = "student.pth", "without a classifier"
    factors, smallest = staticmethod(factors), staticmethod(smallest)
    inherit = staticmethod(inherit)

    def __init__(self, start: Any, classes: Sequence[str] | None = None) -> None:
        self.start, self.classes = start.eval(), classes
        self.config = written_out(start.backbone if isinstance(start, Classifier) else start)

    def count(self, config: Config) -> tuple[int, int]:
        """See :func:`count`."""
        return count(config)

    def open(self, file: Path) -> Any:
        """The classifier or backbone of a file."""
        model, self.classes = open_model(file)
        return model

    def save(self, model: Any, file: Path, meta: dict[str, Any] | None = None) -> None:
        """Write a model with the names of its classes."""
        save_model(model, file, self.classes, meta)


def count(config: Config) -> tuple[int, int]:
    """Parameters and multiply-adds of one image, of the backbone without a classifier, as
    :mod:`tinymim_export.graph.cost` counts them; nothing is computed.
    """
    return _count(json.dumps(config))


@functools.cache
def _count(config: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = from_config(parse(config, dict[str, Any], "the model")).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward_map(torch.zeros(1, 3, *model.img_size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


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
