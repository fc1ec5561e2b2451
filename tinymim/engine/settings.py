"""What the training jobs can be asked for: each field is a keyword of the Python function and an option of the command.

A field's metadata say how the command shows it, and whether it is an override of a recipe key.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tinymim.distill.teachers import named_teachers


def option(help: str, *, recipe: str | None = None, default: Any = None, **argument: Any) -> Any:
    """A field of a settings class.

    Args:
        help: What ``--help`` says.
        recipe: The recipe key it overrides; None: it is no recipe key.
        default: Where it is not given.
        argument: Keywords of ``ArgumentParser.add_argument``.
    """
    return field(default=default, metadata={"help": help, "recipe": recipe, "argument": argument})


def flag(help: str) -> Any:
    """A field that is False until its option is given."""
    return option(help, default=False, action="store_true")


@dataclass(kw_only=True)
class Settings:
    """What every job takes.

    Attributes:
        data: Folder of photos.
        val_data: Folder of held-out photos.
        out: Run folder; None: ``runs/<recipe>``.
        img_size: Side of the crops, pixels.
        epochs: Passes over the photos.
        batch_size: Global batch; split over processes and micro-batches.
        lr: Peak rate as it is; None: base_lr * batch / 256.
        max_steps: Stop after so many steps (the schedule is fitted to them).
        save_every: Steps between checkpoints; None: an epoch.
        workers: Data-loading processes.
        seed: Fixes order, crops, augmentation, masks, drop path and start values.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        resume: Go on exactly where the run in ``out`` stopped.
        overwrite: Replace the run in ``out``.
        dry_run: One step, memory and time, no files.
        cfg_options: Dotted recipe keys.
    """

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
    lr: float | None = option("peak rate; default base_lr * batch / 256", type=float)
    max_steps: int | None = option("stop after so many steps", type=int)
    save_every: int | None = option("steps between checkpoints; default an epoch", recipe="save_every", type=int)
    workers: int | None = option("data-loading processes", recipe="workers", type=int)
    seed: int | None = option("fixes order, crops, masks and start values", recipe="seed", type=int)
    device: str | None = option("cpu, cuda or cuda:N; default a GPU if there is one")
    resume: bool = flag("go on exactly where the run in --out stopped")
    overwrite: bool = flag("replace the run in --out")
    dry_run: bool = flag("one step: memory and time, no files")
    cfg_options: dict[str, Any] | None = None

    def overrides(self) -> dict[str, Any]:
        """Recipe key -> value, for everything that was given; ``cfg_options`` last."""
        given = {f.metadata["recipe"]: getattr(self, f.name) for f in fields(self) if f.metadata.get("recipe")}
        return {**given, **(self.cfg_options or {})}


@dataclass(kw_only=True)
class PretrainSettings(Settings):
    """What jobs on photos without labels take besides.

    Attributes:
        model: Registry name of the student.
        student: The same.
        init_from: Checkpoint to start the student from.
        probe_data: Folder with a sub-folder for each class, or with such folders train and val: k-NN and linear probe.
        title: Start of the live line; None: the method's.
    """

    model: str | None = option("registry name, e.g. tinymim_vit_tiny")
    student: str | None = None
    init_from: str | Path | None = option("checkpoint to start from (a new run)", metavar="FILE")
    probe_data: str | Path | None = option(
        "a sub-folder for each class (or train/ and val/ of such): k-NN and linear probe while it learns",
        metavar="FOLDER",
    )
    title: str | None = None

    def overrides(self) -> dict[str, Any]:
        return {"student": self.student or self.model, **super().overrides()}


@dataclass(kw_only=True)
class DistillSettings(PretrainSettings):
    """What distillation takes besides.

    Attributes:
        teacher: ``timm/NAME`` or a checkpoint; several, each ``NAME`` or ``NAME=WEIGHT``, teach at once.
        teacher_weights: File for a timm teacher; for several one each, "-" where there is none.
        targets: Words of :mod:`tinymim.distill.targets`.
        teacher_heads: Heads of a teacher file that does not say.
    """

    model: str | None = None
    student: str | None = option("registry name, e.g. tinymim_vit_tiny")
    teacher: str | Sequence[str] | None = option(
        "timm/NAME, e.g. timm/vit_large_patch16_224.mae, or a checkpoint file; several (NAME=WEIGHT) teach at once",
        nargs="+",
        metavar="TEACHER",
    )
    teacher_weights: str | Sequence[str] | None = option(
        "weights for a timm teacher, instead of downloading; for several one each", nargs="+", metavar="FILE"
    )
    targets: list[str] | None = option(
        "what is compared, WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]: qk+vv (default), output, attn_pre, "
        "attn_post, ffn_pre, qkv, class_token",
        recipe="targets",
        nargs="+",
        metavar="WORD",
    )
    teacher_heads: int | None = option(
        "heads per block of a teacher file that does not say", recipe="teacher_heads", type=int
    )

    def overrides(self) -> dict[str, Any]:
        return {**named_teachers(self.teacher, self.teacher_weights), **super().overrides()}


@dataclass(kw_only=True)
class FinetuneSettings(Settings):
    """What fine-tuning takes besides; ``data`` and ``val_data`` have a sub-folder for each class.

    Attributes:
        student: Checkpoint of the encoder; None: start from random weights.
        model: Registry name; where a file is given its width, depth and patch size hold.
        num_heads: Heads per block; None: the file's, else the model's. Another number than the file's regroups the same
            weights, as the published runs did (TinyMIM-T was pre-trained with 6 heads and fine-tuned with 3).
        teacher: ``timm/NAME`` or a ``classifier.pth``: DeiT's distillation.
        teacher_weights: File for a timm teacher.
    """

    data: str | Path = field(
        metadata={"help": "photos, one sub-folder per class", "recipe": None, "argument": {"metavar": "FOLDER"}}
    )
    val_data: str | Path | None = option("held-out photos to score, the same sub-folders", metavar="FOLDER")
    student: str | Path | None = option("encoder to start from; without it: random weights", metavar="FILE")
    model: str | None = option("registry name, e.g. tinymim_vit_tiny", recipe="student")
    num_heads: int | None = option(
        "heads per block; another number than the file's regroups them", recipe="num_heads", type=int
    )
    teacher: str | None = option(
        "timm/NAME with a classifier, or a classifier.pth: DeiT's distillation", recipe="teacher"
    )
    teacher_weights: str | None = option(
        "weights for a timm teacher, instead of downloading", recipe="teacher_weights", metavar="FILE"
    )


def add_options(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """The options of a settings class; ``data`` may be left out there, so that the command can say what is missing."""
    for each in fields(settings):
        if "argument" in each.metadata:
            name = "--" + each.name.replace("_", "-")
            parser.add_argument(name, help=each.metadata["help"], **each.metadata["argument"])
