"""The model that MMEngine's Runner trains: one of our methods as a BaseModel, uint8 photos in, named losses out."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from tinymim.data.jitter import apply_jitter
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
        super().__init__(dict(type="BaseDataPreprocessor", non_blocking=True))  # the loader pins its batches for a GPU
        self.autocast = autocast
        self.last_batch: dict[str, Tensor] = {}
        self.passes: list[tuple[Tensor, dict[str, Tensor]]] = []  # loss and batch, since the last check
        self.bad: Tensor | None = None  # see guard
        self.read: torch.cuda.Event | None = None

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

    def prepare(self, dtype: torch.dtype) -> None:
        """Called once, on the model's device: make teachers fast in the type of this run's products."""

    def cast(self, device: str) -> Any:
        """Autocast context of a forward pass; none at all if off, as a disabled one would undo AmpOptimWrapper's."""
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """Called by MMEngine between loss and update: note the loss; :meth:`check_finite` on the CPU.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite.
        """
        loss = losses["loss"]
        self.passes.append((loss.detach(), self.last_batch))
        if loss.device.type == "cpu":  # elsewhere reading it would make the device wait: see guard
            self.check_finite()
        return loss, {k: v.detach() for k, v in losses.items()}

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a fused optimizer skip, on the device, the update of a step whose losses are not all finite.

        :meth:`check_finite`, called once the update is queued, then refuses the step before anything else sees it: no
        pass waits for its loss. All processes of a run refuse the same step.

        Args:
            optimizer: With ``fused=True``.
        """

        def before_step(optimizer: Any, *_: Any) -> None:
            if not self.passes:  # on the CPU: they were checked
                return
            bad = 1 - torch.stack([loss for loss, _ in self.passes]).isfinite().all().float()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
            scaled = getattr(optimizer, "grad_scale", None) is not None  # float16's scaler has looked at the gradients
            optimizer.found_inf = torch.maximum(optimizer.found_inf, bad) if scaled else bad
            self.bad = bad.to("cpu", non_blocking=True)
            self.read = torch.cuda.Event() if bad.is_cuda else None
            if self.read is not None:
                self.read.record()

        optimizer.register_step_pre_hook(before_step)

    def check_finite(self) -> None:
        """Refuse the step if a loss since the last call is not finite; :attr:`last_batch` is then that loss's batch.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite, here or in another process (then ``last_batch`` is empty).
        """
        passes, self.passes = self.passes, []
        if self.read is not None:
            self.read.synchronize()
        if self.bad is not None and not self.bad:
            return
        worst = next(((loss, batch) for loss, batch in passes if not torch.isfinite(loss)), None)
        if worst is None and self.bad is None:
            return
        self.last_batch = {} if worst is None else worst[1]
        raise NonFiniteLoss(
            "the loss of another process is not finite" if worst is None else f"the loss is {float(worst[0])}",
            "the learning rate is too high, the precision too low, or a photo is damaged",
            "see the dumped batch, then resume with a lower --lr or --cfg-options precision=fp32",
        )


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
        """See :attr:`tinymim.distill.method.Method.kept`."""
        return self.method.kept

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume: student, linear maps, decoder (never a teacher)."""
        return self.method.learned

    def prepare(self, dtype: torch.dtype) -> None:
        self.method.prepare(dtype)

    def calibrate(self, dtype: torch.dtype, image: Tensor) -> None:
        """:meth:`~tinymim.distill.method.Method.calibrate` with uint8 photos (B, 3, S, S)."""
        self.method.calibrate(dtype, *self.views(image.float() / 255))

    def forward(  # type: ignore[override]
        self,
        image: Tensor,
        student_image: Tensor | None = None,
        mode: str = "loss",
        jitter: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """uint8 views (B, 3, S, S), and the method's extra tensors (B, ...) -> named losses.

        The student's own view is given, or made here by :func:`~tinymim.data.jitter.apply_jitter`.
        """
        if jitter is not None:
            student_image = apply_jitter(image, jitter)
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
        for name, value in self.method.example(self.photo).items():
            batch[name] = torch.stack([value] * count).to(place)
        return batch


def parameter_groups(model: nn.Module, weight_decay: float, undecayed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; 1-D parameters without, and those whose names end in ``undecayed``.

    (The class token is decayed in pre-training, as published.)
    """
    free = tuple(f".{name}" for name in undecayed)
    named = [
        (p, p.ndim > 1 and not f".{name}".endswith(free)) for name, p in model.named_parameters() if p.requires_grad
    ]
    return [
        {"params": [p for p, decayed in named if decayed], "weight_decay": weight_decay},
        {"params": [p for p, decayed in named if not decayed], "weight_decay": 0.0},
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
    with kept_buffers(model):
        more = saved_bytes(model, lambda: model(**batch)["loss"])
        return max(more - saved_bytes(model, lambda: model(**fewer)["loss"]), 1)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Passes inside the block leave no trace in the running statistics of batch norm."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class _Saved:
    """A tensor that autograd keeps; freed with the part of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of a loss needs (any device), without the parameters.

    They are what autograd keeps and, with gradient checkpointing, what it would keep of one block without: blocks are
    computed again one at a time.
    """
    kept = _kept_bytes(model, loss)
    switched: list[Any] = [module for module in model.modules() if vars(module).get("grad_checkpointing")]
    if not switched:
        return kept
    blocks = max(getattr(m, "depth", 1) for m in model.modules() if getattr(m, "grad_checkpointing", False))
    for module in switched:
        module.grad_checkpointing = False
    try:
        return kept + max(_kept_bytes(model, loss) - kept, 0) // blocks
    finally:
        for module in switched:
            module.grad_checkpointing = True


def _kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps; memory that is freed before the loss is computed may be reused and does not count."""
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
