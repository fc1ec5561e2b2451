"""What ``tools/bench_distill.py`` measures, each the body of a process: our step, the published one, products, losses.

Ours is the command's own :class:`~tinymim.engine.pretraining.DistillJob`, with a hook that waits for its turn; nothing
of its model, loader, optimizer or loop is repeated here. Teachers have random weights: time does not depend on them.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from tinymim.benchmarks.published_step import (
    PublishedPhotos,
    PublishedStep,
    PublishedViT,
    published_loader,
    published_losses,
)
from tinymim.benchmarks.step_profile import ProfiledTurns, mark
from tinymim.benchmarks.turns import Turns
from tinymim.data.photos import collate, list_photos
from tinymim.distill import taps
from tinymim.distill.relations import relation_kl, relation_logits, relation_losses
from tinymim.distill.targets import Relation
from tinymim.engine.pretraining import DistillJob, PretrainJob
from tinymim.engine.settings import DistillSettings
from tinymim.models import create_model, vit
from tinymim_export.bench.timing import own_peak_mib

TEACHERS = {  # name, width, depth, heads, target block (from 1; 18 of 24 as published, else the last)
    "S": ("timm/vit_small_patch16_224", 384, 12, 6, 12),
    "B": ("timm/vit_base_patch16_224.mae", 768, 12, 12, 12),
    "L": ("timm/vit_large_patch16_224.mae", 1024, 24, 16, 18),
}
STUDENTS = {"T": "tinymim_vit_tiny", "S": "tinymim_vit_small", "B": "tinymim_vit_base"}
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product gives the machine's rate
M_MMAP_THRESHOLD = -3  # of mallopt: larger blocks are mapped, and unmapped once they are freed
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """One configuration.

    Attributes:
        student: "T", "S" or "B".
        teacher: "S", "B" or "L".
        size: Side of the crops, pixels.
        batch: Images per step, in one pass.
        precision: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
        photos: Folder of photos.
        loading: Whether photos are read while it trains; else one batch is read once and used again.
        workers: Data-loading processes.
        seed: Of weights, order and augmentation.
        drop_path: Rate of the student's blocks before the last.
        whole_teacher: See :class:`~tinymim.benchmarks.published_step.PublishedViT`.
        int8_teacher: Whether our teacher's products are of 8 bits (``teacher_precision=int8``).
        profiled: Whether turns tell the time by kind of operation.
    """

    student: str
    teacher: str
    size: int
    batch: int
    precision: str
    device: str
    photos: str
    loading: bool = False
    workers: int = 2
    seed: int = 0
    drop_path: float = 0.1
    whole_teacher: bool = False
    int8_teacher: bool = False
    profiled: bool = False


def turns_on(setup: Setup, pipe: Any, before: float = 0.0) -> Turns:
    """Turns with the device's clock and the process's peak memory, less ``before`` MiB."""
    kind = ProfiledTurns if setup.profiled else Turns
    if setup.device == "cuda":
        return kind(pipe, torch.cuda.synchronize, lambda: torch.cuda.max_memory_allocated() / 2**20 - before)
    return kind(pipe, lambda: None, lambda: own_peak_mib() - before)


# our step ---------------------------------------------------------------------------------------------------------


class Held(Dataset[Any]):
    """The first items of a dataset, read once."""

    def __init__(self, photos: Any, count: int) -> None:
        self.items, self.length = [photos[(0, i)] for i in range(count)], len(photos)
        self.collate = getattr(photos, "collate", collate)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items[key[1] % len(self.items)])


class TurnHook(Hook):
    """Tells :class:`Turns` when a step begins and ends."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.turns.before(runner.train_loop.waited)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.turns.after()


class InTurns(PretrainJob):
    """A job step by step in turns, its teachers with random weights, its first batch again and again.

    Attributes:
        batch: Images of a step.
        loading: Whether photos are read while it trains.
        turns: Of this process; None: none are taken.
    """

    batch: int
    loading = False
    turns: Turns | None = None

    def make_model(self, autocast: torch.dtype | None) -> Any:
        given = self.settings
        self.settings = dataclasses.replace(given, dry_run=True)  # teachers with random weights
        try:
            return super().make_model(autocast)
        finally:
            self.settings = given

    def photos(self, train: bool = True, files: list[Path] | None = None) -> Any:
        photos = super().photos(train, files)
        return Held(photos, self.batch) if train and not self.loading else photos

    def hooks_after(self) -> list[Hook]:
        return [*super().hooks_after(), *([] if self.turns is None else [TurnHook(self.turns)])]


class MeasuredJob(InTurns, DistillJob):
    """The job of ``tinymim distill``, step by step in turns."""

    def __init__(self, setup: Setup, out: Path, turns: Turns | None = None) -> None:
        self.setup, self.turns, self.batch, self.loading = setup, turns, setup.batch, setup.loading
        options = {
            "precision": setup.precision,
            "micro_batch": setup.batch,
            "drop_path": setup.drop_path,
            "watch_every": 0,
            "target_block": TEACHERS[setup.teacher][-1],
            "teacher_precision": "int8" if setup.int8_teacher else "auto",
        }
        settings = DistillSettings(
            data=setup.photos,
            out=out,
            model=STUDENTS[setup.student],
            teacher=TEACHERS[setup.teacher][0],
            img_size=setup.size,
            batch_size=setup.batch,
            epochs=1e6,
            save_every=10**9,
            workers=setup.workers if setup.loading else 0,
            seed=setup.seed,
            device=setup.device,
            cfg_options=options,
        )
        super().__init__("tinymim_tiny_from_mae_base", settings)


def ours(setup: Setup, pipe: Any) -> None:
    """Body: our step."""
    if setup.profiled:
        mark(Relation, "losses", "loss")
        for room in (taps, vit):
            mark(room, "attention", "attention")
    with tempfile.TemporaryDirectory() as folder:
        MeasuredJob(setup, Path(folder) / "run", turns_on(setup, pipe)).run()


# the published step -----------------------------------------------------------------------------------------------


def published_models(setup: Setup) -> tuple[PublishedViT, PublishedViT]:
    """The re-created student and teacher, with new weights."""
    student = create_model(STUDENTS[setup.student], img_size=setup.size)
    _, width, depth, heads, block = TEACHERS[setup.teacher]
    learner = PublishedViT(
        img_size=setup.size,
        width=student.embed_dim,
        depth=student.depth,
        heads=student.num_heads,
        relation_heads=heads,
        block=student.depth,
        drop_path=setup.drop_path,
    )
    taught_by = PublishedViT(
        img_size=setup.size,
        width=width,
        depth=depth,
        heads=heads,
        relation_heads=heads,
        block=block,
        whole=setup.whole_teacher,
    )
    return learner, taught_by


def published(setup: Setup, pipe: Any) -> None:
    """Body: the published step."""
    torch.manual_seed(setup.seed)
    turns = turns_on(setup, pipe)
    student, teacher = (model.to(setup.device) for model in published_models(setup))
    step = PublishedStep(student.train(), teacher, lr=1.5e-4 * setup.batch / 256, device=setup.device)
    for views, waited in published_batches(setup):
        turns.before(waited)
        step(*views)
        turns.after()


def published_batches(setup: Setup) -> Iterator[tuple[list[Tensor], float]]:
    """Batches of the published pipeline for ever, and the seconds that each was waited for."""
    photos = list_photos(setup.photos)
    if not setup.loading:
        items = [PublishedPhotos(photos, setup.size)[i] for i in range(setup.batch)]
        yield from itertools.repeat(([torch.stack(views) for views in zip(*items, strict=True)], 0.0))
    loader = published_loader(
        photos, img_size=setup.size, batch=setup.batch, workers=setup.workers, device=setup.device
    )
    while True:
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            views = next(batches, None)
            if views is None:
                break
            yield views, time.perf_counter() - began


def matrix_flop(setup: Setup) -> int:
    """Floating-point operations of the matrix products that one image needs, forward and backward.

    Counted on the published step without its surplus: the teacher up to its block's q, k, v, every product once
    (attention and relations included), no recomputation.
    """
    with torch.device("meta"):
        student, teacher = published_models(dataclasses.replace(setup, whole_teacher=False))
        images = torch.empty(1, 3, setup.size, setup.size)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            taught = teacher(images)
        sum(published_losses(student(images), taught)).backward()  # type: ignore[union-attr]
    return counter.get_total_flops()


# the machine and the loss -----------------------------------------------------------------------------------------


def products(setup: Setup, pipe: Any) -> None:
    """Body: products of square matrices of :data:`SIDE`, random numbers in the setup's precision."""
    turns, side = turns_on(setup, pipe), SIDE[setup.device]
    a, b = (torch.randn(side, side, device=setup.device).to(TYPES[setup.precision]) for _ in range(2))
    while True:
        turns.before()
        torch.mm(a, b)
        turns.after()


def memory_of_loss(spec: tuple[Setup, str], pipe: Any) -> None:
    """Body: :func:`loss_alone` where glibc keeps no freed block: the peak of the process is what is in use. Slower."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    loss_alone(spec, pipe)


def loss_alone(spec: tuple[Setup, str], pipe: Any) -> None:
    """Body: the relation losses of given q, k, v and their gradient; memory is what comes on top of these.

    Args:
        spec: The configuration, and "plain" (:func:`relation_kl` of stored logits) or "ours" (``relation_losses``).
        pipe: For the turns.
    """
    setup, form = spec
    heads, tokens = TEACHERS[setup.teacher][3], (setup.size // 16) ** 2 + 1
    widths = create_model(STUDENTS[setup.student], img_size=setup.size).embed_dim, TEACHERS[setup.teacher][1]

    def sides(batch: int, tokens: int) -> list[dict[str, Tensor]]:
        dtype = TYPES[setup.precision]
        make = [torch.randn(batch, tokens, 3 * width, device=setup.device).to(dtype) for width in widths]
        return [dict(zip("qkv", x.requires_grad_(not i).chunk(3, -1), strict=True)) for i, x in enumerate(make)]

    def once(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        if form == "ours":
            loss: Any = sum(relation_losses(student, teacher, heads).values())
        else:
            logits = [
                [relation_logits(side[a].float(), side[b].float(), heads) for side in (student, teacher)]
                for a, b in ("qk", "vv")
            ]
            loss = sum(relation_kl(*pair) for pair in logits)
        torch.autograd.grad(loss, list(student.values()))

    once(*sides(1, 17))  # what is loaded at the first use is no memory of the loss
    student, teacher = sides(setup.batch, tokens)
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        with contextlib.suppress(OSError):  # Linux forgets the peak so far
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = own_peak_mib()
    turns = turns_on(setup, pipe, before)
    while True:
        turns.before()
        once(student, teacher)
        turns.after()
