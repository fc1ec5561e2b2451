"""What D-MAE (arXiv 2404.12210) is for any hierarchical model: pixels, and a frozen teacher's attention logits.

Legend: B = batch, W = windows of a block (1: global attention), H = heads, q, k = queries and keys of a window,
C = channels per head, U = mask units.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinymim.distill.checks import check_heads, pair_blocks
from tinymim.distill.dmae import BLOCKS
from tinymim.distill.frozen import prepare_frozen
from tinymim.distill.method import Method, Normalisation, renormalisation
from tinymim.distill.recipe_keys import Choice, Key
from tinymim.distill.teachers import TEACHER_KEYS, load_recipe_teacher
from tinymim.errors import ConfigError
from tinymim.models.masked_hierarchical import Attention
from tinymim.models.teachers import Teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD


def attention_logits(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Q (B * W, H, q, C) and K (B * W, H, k, C) -> Q K^T / sqrt(C) + bias (1, H, q, k), float32, (B * W, H, q, k)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(2, 3)
        return logits if bias is None else logits + bias.float()


class HierarchicalDistillation(Method):
    """A masked autoencoder whose encoder also learns a teacher's attention logits, on the same masked photo.

    Subclasses say how a student is masked and how both sides are read.

    Args:
        student: The encoder of the autoencoder.
        teacher: A frozen model of the same family.
        student_blocks: Blocks of the student whose attention is compared, from 1; None: the last.
        teacher_blocks: Those of the teacher, as many; None: the last.
        head_map: Map heads by a 1x1 convolution without bias for each pair. False compares logits as they are.
        normalisation: Mean and standard deviation of the teacher's images; None: ImageNet's.
        options: Keywords of the autoencoder.

    Attributes:
        autoencoder: The student's, with what predicts pixels.
        pairs: (block of the student, block of the teacher).
        head_maps: The maps, one for each pair.

    Raises:
        ConfigError: models of different families, blocks that do not exist or whose windows differ, or
            ``head_map=False`` with different numbers of heads.
    """

    common: ClassVar[Mapping[str, Key]] = {
        "teacher": TEACHER_KEYS["teacher"],
        "teacher_weights": TEACHER_KEYS["teacher_weights"],
        "student_blocks": BLOCKS,  # whose attention is compared, from 1; None: the last
        "teacher_blocks": BLOCKS,
        "head_map": Choice(True, (True, False)),  # map the student's heads to the teacher's
    }

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_blocks: Sequence[int] | None = None,
        teacher_blocks: Sequence[int] | None = None,
        head_map: bool = True,
        normalisation: Normalisation | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self.autoencoder = self.mask(student, teacher, **options)
        self.teacher = teacher.eval().requires_grad_(False)
        self.dtype: torch.dtype | None = None
        self.pairs = pair_blocks(student_blocks, teacher_blocks, (self.last_block, int(teacher.depth)))
        heads = [self.check_pair(*pair) for pair in self.pairs]
        check_heads(heads, head_map)
        self.head_maps = nn.ModuleList(nn.Conv2d(*pair, 1, bias=False) for pair in heads if head_map)
        self.renormalise: Tensor
        self.register_buffer("renormalise", renormalisation(normalisation), persistent=False)

    # what a subclass provides ----------------------------------------------------------------------------------------

    def mask(self, student: Any, teacher: Any, **options: Any) -> Any:
        """The student's autoencoder; models that do not fit are refused."""
        raise NotImplementedError

    @property
    def last_block(self) -> int:
        """The last block of the student whose attention can be compared."""
        return int(self.student.depth)

    def check_pair(self, own: int, taught: int) -> tuple[int, int]:
        """Heads of a block of the student and of one of the teacher; those that see different tokens are refused."""
        raise NotImplementedError

    def read_student(self, images: Tensor, order_BU: Tensor) -> tuple[Tensor, list[Attention]]:
        """The pixel loss, and what the student attends to in each pair."""
        raise NotImplementedError

    def read_teacher(self, images: Tensor, order_BU: Tensor) -> list[Attention]:
        """What the teacher attends to in each pair."""
        raise NotImplementedError

    # a method --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "HierarchicalDistillation":
        if not recipe.teacher:
            raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
        entry = {"teacher": recipe.teacher, "teacher_weights": recipe.teacher_weights}
        entry |= {"teacher_heads": None, "align": None}
        teacher = load_recipe_teacher(recipe, entry, student, pretrained=pretrained)
        options = {key: recipe[key] for key in cls.keys if key not in entry}
        method = cls(student, cls.ready(teacher, recipe), normalisation=(teacher.mean, teacher.std), **options)
        method.teachers = [teacher]
        return method

    @classmethod
    def ready(cls, teacher: Teacher, recipe: Any) -> Any:
        """The model of a recipe's teacher, with whatever else its file holds."""
        return teacher.model

    @property
    def normalisations(self) -> list[Normalisation]:
        """One: the teacher sees the student's view, normalised for it in :meth:`losses`."""
        return [(IMAGENET_MEAN, IMAGENET_STD)]

    @property
    def learned(self) -> nn.Module:
        """The autoencoder and the maps."""
        return nn.ModuleDict({"network": self.autoencoder, "head_maps": self.head_maps})

    def prepare(self, dtype: torch.dtype) -> None:
        """On the model's device: :func:`~tinymim.distill.frozen.prepare_frozen`; the teacher then runs in this type."""
        prepare_frozen(self.teacher, dtype)
        self.dtype = None if dtype == torch.float32 else dtype

    def train(self, mode: bool = True) -> "HierarchicalDistillation":
        """Training mode for all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(  # type: ignore[override]
        self, images: Tensor, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            images: (B, 3, height, width), normalised for the student, of whole mask units.
            order: (B, U), a permutation of the mask units of each image, row-major; the first are visible to both
                models. None: drawn.

        Returns:
            ``pixel``: the autoencoder's loss; ``attention``: the mean squared errors of the logits, summed over the
            pairs; ``loss``: their sum.
        """
        order = self.autoencoder.draw(images) if order is None else order
        pixel, learned = self.read_student(images, order)
        scale, shift = self.renormalise.to(images.dtype)
        precision = nullcontext() if self.dtype is None else torch.autocast(images.device.type, dtype=self.dtype)
        with torch.no_grad(), precision:
            taught = self.read_teacher(images * scale + shift, order)
        maps = self.head_maps if self.head_maps else [None] * len(self.pairs)
        with torch.autocast(images.device.type, enabled=False):
            errors = []
            for own, target, head_map in zip(learned, taught, maps, strict=True):
                logits = attention_logits(*own)
                logits = logits if head_map is None else head_map(logits)
                errors.append((logits - attention_logits(*target)).square().mean())
        attention = torch.stack(errors).sum()
        return {"pixel": pixel, "attention": attention, "loss": pixel + attention}
