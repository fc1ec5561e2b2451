"""Fast distillation (TinyViT, arXiv 2207.10666): a small classifier learns a teacher's sparse probabilities.

They were written once (``tinymim cache``) for views that a seed makes again, so that training costs no teacher; or the
teacher runs beside the student, on the same views with the same loss.

Legend: B = batch, K = classes whose probabilities are kept, C = all classes of the teacher.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinymim.compat import is_first_process
from tinymim.distill.logits import sparse_cross_entropy
from tinymim.distill.method import Method, Normalisation, register_method
from tinymim.distill.recipe_keys import Key, Kind, Number
from tinymim.distill.stored_logits import StoredLogits
from tinymim.errors import ConfigError
from tinymim.models.checkpoints import load_weights, read_checkpoint
from tinymim.models.classifier import (
    Classifier,
    count_classes,
    fill_heads,
    imagenet_names,
    save_classifier,
    stored_heads,
)
from tinymim.models.logit_teacher import LogitTeacher, load_logit_teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.progress import say
from tinymim.store.targets import TargetStore

DEFAULTS: dict[str, Any] = {
    "rand_augment": "m9-mstd0.5-inc1",
    "erasing": 0.25,
    "mixup": 0.0,
    "cutmix": 0.0,
}  # TinyViT's


@register_method("fast_distill", verb="distill", title="distil")
class FastDistill(Method):
    """Soft cross entropy with a teacher's K largest probabilities, what they lack spread evenly; no labels.

    The student becomes a classifier (:class:`~tinymim.models.classifier.Classifier`) of the teacher's classes.
    ``student.pth`` keeps its head: ``tinymim eval`` scores it where its classes are known, fine-tuning takes its
    encoder (with ``head="by_class"`` its rows, too), segmentation its encoder.

    Args:
        student: Any backbone.
        classes: C.
        stored: Where the targets lie; None: the teacher gives them.
        teacher: A frozen classifier, or None.
        topk: K of a live teacher; None: all classes.
        temperature: See :func:`~tinymim.distill.logits.sparse_cross_entropy`.
        augmentation: Arguments of :class:`tinymim.data.replay.Replay`.
    """

    keys: ClassVar[Mapping[str, Key]] = {
        "store": Kind(example="FOLDER"),  # what tinymim cache wrote
        "teacher": Kind(),  # timm/NAME or a classifier.pth: of the store, or, without one, beside the student
        "teacher_weights": Kind(example="FILE"),  # weights file for a timm teacher
        "topk": Number(None, least=1, whole=True),  # K; None: the store's, of a live teacher all classes
        "classes": Number(None, least=2, whole=True),  # C that the teacher must have; None: any
        "temperature": Number(1.0, above=True),
        # of the views; None: the store's, with a live teacher TinyViT's
        "rand_augment": Kind(example="m9-mstd0.5-inc1"),  # or "none"
        "erasing": Number(None, most=1),
        "mixup": Number(None),
        "cutmix": Number(None),
        "clip_grad": Number(5.0, above=True),  # largest norm of the gradients; None: any
    }

    def __init__(
        self,
        student: Any,
        classes: int,
        *,
        stored: StoredLogits | None = None,
        teacher: LogitTeacher | None = None,
        topk: int | None = None,
        temperature: float = 1.0,
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = Classifier(student, classes)
        self.stored, self.live, self.topk, self.temperature = stored, teacher, topk or classes, temperature
        self.live_model = None if teacher is None else teacher.model  # so that it goes to the student's device
        self.augmentation = augmentation
        self.class_names = getattr(teacher or stored, "class_names", None)
        given: Any = teacher or (stored and stored.teacher)
        self.teachers = [given] if given else []
        self.dtype = torch.float32

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "FastDistill":
        own = {
            "img_size": recipe.img_size,
            "scale": [float(share) for share in recipe.crop_scale],
            **{name: recipe[name] for name in DEFAULTS if recipe[name] is not None},
        }
        if recipe.store:
            stored = StoredLogits(TargetStore.open(recipe.store))
            with torch.random.fork_rng(devices=[]):  # the new head is the same whatever is loaded before it
                stored.check_recipe(recipe)
            given: dict[str, Any] = dict(stored=stored, topk=stored.topk, augmentation={**stored.augmentation, **own})
            return cls(student, stored.classes, temperature=recipe.temperature, **given)
        if not recipe.teacher:
            raise ConfigError(
                "no targets",
                "neither a store nor a teacher is given",
                "write a store (tinymim cache --teacher timm/NAME --data FOLDER --out STORE) and add --store STORE; or "
                "add --teacher timm/NAME, which then runs beside the student",
            )
        with torch.random.fork_rng(devices=[]):
            teacher = load_logit_teacher(recipe.teacher, weights=recipe.teacher_weights, pretrained=pretrained)
        for name, wanted in (("classes", recipe.classes), ("topk", recipe.topk)):
            if wanted is not None and (wanted > teacher.classes or (name == "classes" and wanted != teacher.classes)):
                raise ConfigError(
                    f"{name}={wanted} and the teacher {teacher.name}",
                    f"it has {teacher.classes} classes",
                    f"use --cfg-options {name}={teacher.classes}, or another --teacher",
                )
        given = dict(teacher=teacher, topk=recipe.topk, augmentation={**DEFAULTS, **own})
        return cls(student, teacher.classes, temperature=recipe.temperature, **given)

    @property
    def student(self) -> Any:  # type: ignore[override]
        """The backbone of the classifier."""
        return self.network.backbone

    @property
    def kept(self) -> nn.Module:
        """The classifier."""
        return self.network

    @property
    def learned(self) -> nn.Module:
        """The classifier."""
        return self.network

    @property
    def normalisations(self) -> list[Normalisation]:
        """The student's, and for a live teacher, which normalises by itself, values in 0..1."""
        own: Normalisation = (IMAGENET_MEAN, IMAGENET_STD)
        return [own, ((0.0,) * 3, (1.0,) * 3)] if self.live is not None else [own]

    def undecayed(self) -> Iterable[str]:
        """The backbone's: tokens, positions, attention biases."""
        names: Iterable[str] = self.network.backbone.no_weight_decay()
        return names

    def prepare(self, dtype: torch.dtype) -> None:
        """A live teacher computes in this type."""
        self.dtype = dtype

    def train(self, mode: bool = True) -> "FastDistill":
        """Training mode for the classifier; a live teacher stays in evaluation mode."""
        super().train(mode)
        if self.live_model is not None:
            self.live_model.eval()
        return self

    def losses(self, *views: Tensor, extra: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            views: The student's images (B, 3, H, W), normalised; with a live teacher also the same pixels in 0..1.
            extra: Without one, ``values`` and ``indices``, (B, K) each.

        Returns:
            ``logits`` and ``loss``, the same scalar.
        """
        if self.live is not None:
            values_BK, indices_BK = self.live.probabilities(views[1], self.dtype).topk(self.topk)
        else:
            assert extra is not None
            values_BK, indices_BK = extra["values"], extra["indices"]
        loss = sparse_cross_entropy(self.network(views[0]), values_BK, indices_BK, self.temperature)
        return {"logits": loss, "loss": loss}

    def start_from(self, file: str | os.PathLike[str]) -> None:
        """The backbone of a file; and its head, if it is a classifier of as many classes."""
        checkpoint = read_checkpoint(file)
        load_weights(self.student, checkpoint)
        heads = stored_heads(self.student, checkpoint)
        if heads and count_classes(heads) == self.network.num_classes:
            fill_heads(self.network, heads)
        elif is_first_process():
            say(f"note: {file} has no head of {self.network.num_classes} classes: the student's starts new")

    def save(self, network: Any, path: Path, meta: dict[str, Any]) -> None:
        """Write the classifier, with the names of its classes: the teacher's, or those of timm's set of so many."""
        save_classifier(network, path, self.class_names or imagenet_names(network.num_classes), meta)
