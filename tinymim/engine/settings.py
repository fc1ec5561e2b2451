"""Settings of the training jobs: each field is a keyword of the Python function and an option of the command.

A field's metadata hold its help text and arguments for the command, and the recipe key that it overrides, if any.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

LOG_HELP = "also log to tensorboard, wandb, mlflow, clearml, neptune, dvclive or aim"


def option(help: str, *, recipe: str | None = None, default: Any = None, **argument: Any) -> Any:
    """A field of a settings class.

    Args:
        help: Text of ``--help``.
        recipe: The recipe key it overrides, or None.
        default: Default value.
        argument: Keywords of ``ArgumentParser.add_argument``.
    """
    return field(default=default, metadata={"help": help, "recipe": recipe, "argument": argument})


def count_or_auto(text: str) -> int | str:
    """A number, or "auto"; anything else is refused by the recipe."""
    return int(text) if text.isdecimal() else text


def flag(help: str) -> Any:
    """A field that is False until its option is given."""
    return option(help, default=False, action="store_true")


@dataclass(kw_only=True)
class Settings:
    """Settings of every job. The command needs them before anything else: this module imports no PyTorch.

    Attributes:
        default_recipe: Name of the job's recipe where none is given.
        data: Folder of photos.
        val_data: Folder of held-out photos.
        out: Run folder; None: ``runs/<recipe>``.
        img_size: Side of the crops, pixels.
        epochs: Passes over the photos.
        batch_size: Global batch; split over processes and micro-batches.
        micro_batch: Images per pass, "auto" for the fastest that fits, timed before the first step; None: by memory.
        grad_checkpointing: Recompute the student's blocks in the backward pass instead of storing their activations.
        lr: Peak learning rate, not scaled; None: base_lr * batch / 256.
        max_steps: Largest number of steps; the schedule ends there.
        save_every: Steps between checkpoints; None: an epoch.
        workers: Data-loading processes; None: chosen by the machine.
        seed: Fixes order, crops, augmentation, masks, drop path and initial weights.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        strategy: Of several processes: "ddp" (None), or "fsdp", which shards weights and moments.
        log: Also log to these, see :data:`tinymim.engine.log_backends.BACKENDS`.
        resume: Continue exactly where the run in ``out`` stopped.
        overwrite: Replace the run in ``out``.
        dry_run: One step, memory and time, no files.
        cfg_options: Dotted recipe keys.
    """

    default_recipe: ClassVar[str]

    data: str | Path = field(
        metadata={"help": "photos, searched recursively", "recipe": None, "argument": {"metavar": "FOLDER"}}
    )
    val_data: str | Path | None = option("held-out photos for val_loss", metavar="FOLDER")
    out: str | Path | None = option("run folder; default runs/<recipe>", metavar="FOLDER")
    img_size: int | None = option("side of the crops in pixels", recipe="img_size", type=int)
    epochs: float | None = option("passes over the photos", recipe="epochs", type=float)
    batch_size: int | None = option(
        "global batch; split over processes and micro-batches", recipe="batch_size", type=int
    )
    micro_batch: int | str | None = option(
        "images per pass, or auto: the fastest that fits, timed first; default by memory",
        recipe="micro_batch",
        type=count_or_auto,
        metavar="N",
    )
    grad_checkpointing: bool | None = option(
        "recompute blocks in the backward pass: less memory, slower",
        recipe="grad_checkpointing",
        action="store_const",
        const=True,
    )
    lr: float | None = option("peak learning rate; default base_lr * batch / 256", type=float)
    max_steps: int | None = option("largest number of steps", type=int)
    save_every: int | None = option("steps between checkpoints; default one epoch", recipe="save_every", type=int)
    workers: int | None = option("data-loading processes; default chosen by the machine", recipe="workers", type=int)
    seed: int | None = option("fixes order, crops, masks and initial weights", recipe="seed", type=int)
    device: str | None = option("cpu, cuda or cuda:N; default a GPU if there is one")
    strategy: str | None = option(
        "of several processes: ddp, or fsdp to shard weights and moments", recipe="strategy", choices=("ddp", "fsdp")
    )
    log: Sequence[str] | None = option(LOG_HELP, nargs="+", metavar="NAME")
    resume: bool = flag("continue exactly where the run in --out stopped")
    overwrite: bool = flag("replace the run in --out")
    dry_run: bool = flag("one step: memory and time, no files")
    cfg_options: dict[str, Any] | None = None

    def overrides(self) -> dict[str, Any]:
        """Recipe key -> value; None where an option was not given; ``cfg_options`` come last and win."""
        given = {f.metadata["recipe"]: getattr(self, f.name) for f in fields(self) if f.metadata.get("recipe")}
        every = {**given, **(self.cfg_options or {})}
        return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in every.items()}


@dataclass(kw_only=True)
class PretrainSettings(Settings):
    """Additional settings of jobs on photos without labels.

    Attributes:
        model: Registry name of the student.
        student: Another name of ``model``; wins if both are given.
        init_from: Checkpoint to initialise the student from.
        probe_data: Folder with one sub-folder per class, or with such folders train and val: k-NN and linear probe.
        title: Start of the progress line; None: the method's.
    """

    default_recipe = "mae_tiny"

    model: str | None = option("registry name, e.g. tinymim_vit_tiny")
    student: str | None = None
    init_from: str | Path | None = option("checkpoint to initialise the student from (a new run)", metavar="FILE")
    probe_data: str | Path | None = option(
        "one sub-folder per class (or train/ and val/ of such): k-NN and linear probe during training",
        metavar="FOLDER",
    )
    title: str | None = None

    def overrides(self) -> dict[str, Any]:
        return {"student": self.student or self.model, **super().overrides()}


@dataclass(kw_only=True)
class DistillSettings(PretrainSettings):
    """Additional settings of distillation.

    Attributes:
        teacher: ``timm/NAME`` or a checkpoint; several, each ``NAME`` or ``NAME=WEIGHT``, teach at once.
        teacher_weights: File for a timm teacher; for several teachers one each, "-" for none.
        targets: Words of :mod:`tinymim.distill.targets`.
        teacher_heads: Heads per block, for a teacher file that does not store it.
        store: What ``tinymim cache`` wrote, instead of a teacher (fast distillation, TinyMIM).
    """

    default_recipe = "tinymim_tiny_from_mae_base"

    model: str | None = None
    student: str | None = option("registry name, e.g. tinymim_vit_tiny")
    teacher: str | Path | Sequence[str | Path] | None = option(
        "timm/NAME, e.g. timm/vit_large_patch16_224.mae, or a checkpoint file; several (NAME=WEIGHT) teach at once",
        nargs="+",
        metavar="TEACHER",
    )
    teacher_weights: str | Path | Sequence[str | Path] | None = option(
        "weights for a timm teacher, instead of downloading; for several teachers one each", nargs="+", metavar="FILE"
    )
    targets: list[str] | None = option(
        "what is compared, WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]: qk+vv (default), output, attn_pre, "
        "attn_post, ffn_pre, qkv, class_token",
        recipe="targets",
        nargs="+",
        metavar="WORD",
    )
    teacher_heads: int | None = option(
        "heads per block, for a teacher file that does not store it", recipe="teacher_heads", type=int
    )
    store: str | Path | None = option(
        "targets that tinymim cache wrote, instead of a teacher (recipes tinyvit_* and tinymim_*)", metavar="FOLDER"
    )

    def overrides(self) -> dict[str, Any]:
        from tinymim.distill.teachers import named_teachers

        store = None if self.store is None else str(self.store)
        return {**named_teachers(self.teacher, self.teacher_weights), "store": store, **super().overrides()}


@dataclass(kw_only=True)
class FinetuneSettings(Settings):
    """Additional settings of fine-tuning; ``data`` and ``val_data`` have one sub-folder per class.

    Attributes:
        student: Checkpoint of the encoder; None: random weights.
        model: Registry name; a file's width, depth and patch size override it.
        num_heads: Heads per block; None: the file's, else the model's. A number other than the file's regroups the same
            weights, as the published runs did (TinyMIM-T was pre-trained with 6 heads and fine-tuned with 3).
        teacher: ``timm/NAME`` or a ``classifier.pth``: DeiT's distillation.
        teacher_weights: File for a timm teacher.
    """

    default_recipe = "finetune_tiny"

    data: str | Path = field(
        metadata={"help": "photos, one sub-folder per class", "recipe": None, "argument": {"metavar": "FOLDER"}}
    )
    val_data: str | Path | None = option("held-out photos to score, the same sub-folders", metavar="FOLDER")
    student: str | Path | None = option("encoder to start from; default random weights", metavar="FILE")
    model: str | None = option("registry name, e.g. tinymim_vit_tiny", recipe="student")
    num_heads: int | None = option(
        "heads per block; a number other than the file's regroups its weights", recipe="num_heads", type=int
    )
    teacher: str | Path | None = option(
        "timm/NAME with a classifier, or a classifier.pth: DeiT's distillation", recipe="teacher"
    )
    teacher_weights: str | Path | None = option(
        "weights for a timm teacher, instead of downloading", recipe="teacher_weights", metavar="FILE"
    )


@dataclass(kw_only=True)
class DetectSettings(Settings):
    """Additional settings of a detector; ``data`` and ``val_data`` are folders of photos.

    Attributes:
        annotations: Objects of the photos, a JSON file in COCO's format.
        val_annotations: Those of ``val_data``.
        student: Checkpoint of the encoder; None: random weights.
        model: Registry name; a file's width, depth and patch size override it.
        num_heads: Heads per block, for a file that does not store it.
    """

    default_recipe = "mask_rcnn_tiny"

    data: str | Path = field(metadata={"help": "folder of photos", "recipe": None, "argument": {"metavar": "FOLDER"}})
    annotations: str | Path | None = option("their objects, in COCO's format", metavar="FILE.json")
    val_data: str | Path | None = option("held-out photos to score", metavar="FOLDER")
    val_annotations: str | Path | None = option("their objects", metavar="FILE.json")
    student: str | Path | None = option("encoder to start from; default random weights", metavar="FILE")
    model: str | None = option("registry name, e.g. tinymim_vit_tiny or hiera_tiny_224", recipe="student")
    num_heads: int | None = option(
        "heads per block, for a student file that does not store it", recipe="num_heads", type=int
    )


@dataclass(kw_only=True)
class TrackSettings(Settings):
    """Additional settings of a tracker; ``data`` and ``val_data`` hold sequences, as LaSOT's folder does.

    Attributes:
        max_steps: Optimizer steps; they decide the number of epochs, whose pairs are drawn anew each time.
        student: Checkpoint of a plain encoder, which decides width, depth and heads; None: random weights.
        model: Registry name, for a tracker from random weights.
        num_heads: Heads per block, for a file that does not store it.
        img_size: Side of the search crop.
        template_size: Side of the template.
    """

    default_recipe = "track_tiny"

    data: str | Path = field(
        metadata={"help": "sequences in LaSOT's layout, or NAME/img", "recipe": None, "argument": {"metavar": "FOLDER"}}
    )
    val_data: str | Path | None = option("held-out sequences for val_loss and val_iou", metavar="FOLDER")
    img_size: int | None = option("side of the search crop in pixels", recipe="img_size", type=int)
    template_size: int | None = option("side of the template in pixels", recipe="template_size", type=int)
    max_steps: int | None = option("optimizer steps, instead of epochs", type=int)
    student: str | Path | None = option("plain encoder to start from; default random weights", metavar="FILE")
    model: str | None = option("registry name, e.g. tinymim_vit_tiny", recipe="student")
    num_heads: int | None = option(
        "heads per block, for a student file that does not store it", recipe="num_heads", type=int
    )


def add_options(parser: argparse._ActionsContainer, settings: type[Settings]) -> None:
    """Add the options of a settings class; ``--data`` is not required here: the command reports that it is missing."""
    for each in fields(settings):
        if "argument" in each.metadata:
            name = "--" + each.name.replace("_", "-")
            parser.add_argument(name, help=each.metadata["help"], **each.metadata["argument"])


SETTINGS: dict[str, type[Settings]] = {  # by command
    "pretrain": PretrainSettings,
    "distill": DistillSettings,
    "finetune": FinetuneSettings,
    "detect": DetectSettings,
    "track": TrackSettings,
}
