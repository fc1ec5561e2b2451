"""The model that MMEngine's Runner trains: one of our methods as a BaseModel, uint8 photos in, named losses out."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from tinymim.distill.method import Method
from tinymim.errors import TinyMIMError


class NonFiniteLoss(TinyMIMError):
    """A loss that is NaN or infinite; raised before the optimizer sees it."""

    exit_code = 1


class Trainable(BaseModel):
    """The model that our loop trains: named losses of a batch, checked before the update.

    Args:
        autocast: torch.bfloat16 or None. (float16 comes from MMEngine's AmpOptimWrapper, which scales the loss.)
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.last_batch: dict[str, Tensor] = {}

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume (never a teacher)."""
        raise NotImplementedError

    @property
    def encoder(self) -> nn.Module:
        """The network that is kept."""
        raise NotImplementedError

    def example(self, config: Any, count: int, place: str) -> dict[str, Tensor]:
        """A batch of random pixels, for measuring memory and time."""
        raise NotImplementedError

    def cast(self, device: str) -> Any:
        """Autocast context of a forward pass; none at all if off, as a disabled one would undo AmpOptimWrapper's."""
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """Called by MMEngine between loss and update: refuse a loss that is not finite.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        if not torch.isfinite(losses["loss"]):
            raise NonFiniteLoss(
                f"the loss is {float(losses['loss'].detach())}",
                "the learning rate is too high, the precision too low, or a photo is damaged",
                "see the dumped batch, then resume with a lower --lr or --cfg-options precision=fp32",
            )
        return losses["loss"], {k: v.detach() for k, v in losses.items()}


class PretrainModel(Trainable):
    """Normalises the images of student and teachers, runs the method under autocast, checks the loss.

    Args:
        method: The method, with its student and teachers.
        autocast: torch.bfloat16 or None. (float16 comes from MMEngine's AmpOptimWrapper, which scales the loss.)
        photo: One of the photos, from which :meth:`example` reads the method's own tensors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, method: Method, *, autocast: torch.dtype | None = None, photo: Path | None = None) -> None:
        super().__init__(autocast)
        self.method, self.photo = method, photo
        pairs = method.normalisations
        for name, rows in zip(("mean", "std"), zip(*pairs, strict=True), strict=True):  # (sides, 1, 3, 1, 1)
            self.register_buffer(name, torch.tensor(rows).view(len(pairs), 1, 3, 1, 1), persistent=False)

    @property
    def encoder(self) -> nn.Module:
        """The network that is kept: the student."""
        return self.method.student

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume: student, linear maps, decoder (never a teacher)."""
        return self.method.learned

    def forward(  # type: ignore[override]
        self, image: Tensor, student_image: Tensor | None = None, mode: str = "loss", **extra: Tensor
    ) -> dict[str, Tensor]:
        """uint8 views (B, 3, S, S), and the method's extra tensors (B, ...) -> named losses."""
        self.last_batch = {
            "image": image,
            **({} if student_image is None else {"student_image": student_image}),
            **extra,
        }
        views = self.views(image.float() / 255, None if student_image is None else student_image.float() / 255)
        with self.cast(image.device.type):
            return self.method(*views, **({"extra": extra} if extra else {}))

    def views(self, image: Tensor, student_image: Tensor | None = None) -> list[Tensor]:
        """Pixels in 0..1 -> normalised images, each (B, 3, S, S): the student's own copy, then the plain one for each
        teacher.
        """
        pixels = [image if student_image is None else student_image, *[image] * (len(self.mean) - 1)]
        return [(x - m) / s for x, m, s in zip(pixels, self.mean, self.std, strict=True)]

    def example(self, config: Any, count: int, place: str) -> dict[str, Tensor]:
        """Random uint8 views of the recipe's size, and the method's extra tensors of one photo."""
        views = ["image"] if config.color_jitter is None else ["image", "student_image"]
        shape = (count, 3, config.img_size, config.img_size)
        batch = {k: torch.randint(0, 256, shape, dtype=torch.uint8, device=place) for k in views}
        if self.method.per_photo is not None and self.photo is not None:
            for name, value in self.method.per_photo(self.photo, 0).items():
                batch[name] = torch.stack([value] * count).to(place)
        return batch


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, 1-D parameters without (the class token is decayed, as published)."""
    named = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def pick_precision(name: str, device: str) -> tuple[torch.dtype | None, bool]:
    """Recipe value -> (autocast type or None, whether MMEngine's AmpOptimWrapper scales float16 losses).

    ``auto``: on a GPU bfloat16 if supported, else float16; on the CPU bfloat16 if supported in hardware, else float32.

    Raises:
        TinyMIMError: fp16 on the CPU.
    """
    if device == "cuda":
        if name == "auto":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if cpu_has_bf16() else "fp32"
    elif name == "fp16":
        raise TinyMIMError(
            "precision=fp16 needs a GPU",
            "float16 training is not supported on the CPU",
            "use precision=auto (bf16 or fp32)",
        )
    return (torch.bfloat16 if name == "bf16" else None), name == "fp16"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


def saved_bytes_per_image(model: Trainable, batch: dict[str, Tensor]) -> int:
    """:func:`saved_bytes` that one more image costs: of a batch, less those of the batch without its last image."""
    fewer = {key: value[:-1] for key, value in batch.items()}
    more = saved_bytes(model, lambda: model(**batch)["loss"])
    return max(more - saved_bytes(model, lambda: model(**fewer)["loss"]), 1)


class _Saved:
    """A tensor that autograd keeps; freed with the part of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of a loss (any device), without the parameters.

    Only tensors that are still kept once the loss is computed count: memory freed before may have been reused.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def note(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
        kept = loss()
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del kept
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in own}.values())
