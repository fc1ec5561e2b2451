"""``pretrain`` and ``distill``, the jobs on photos without labels, and their result."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn
from torch.utils.data import DataLoader

from tinymim.analysis.probes import trained_depth
from tinymim.data.photo_files import FEW_PHOTOS, photo_names
from tinymim.data.photos import Photos, collate_readable, list_photos
from tinymim.data.replay import Replay
from tinymim.data.replayed import ReplayedPhotos
from tinymim.data.shards import file_bytes
from tinymim.distill.teachers import named_teachers
from tinymim.engine.build import build_method
from tinymim.engine.health import health_hooks, read_probe
from tinymim.engine.hooks import ScheduleHook
from tinymim.engine.job import Job, run_job
from tinymim.engine.model import PretrainModel, parameter_groups
from tinymim.engine.settings import DistillSettings, PretrainSettings
from tinymim.errors import ConfigError, DataError
from tinymim.files import describe_file, describe_files
from tinymim.hub import is_hub
from tinymim.models.weight_files import weights_file

CALIBRATION = 32  # photos, spread over the list, that a teacher is quantised with
SMALL_DATA = "tinymim_tiny_small_data"  # the recipe that a dry run on few photos proposes


@dataclass
class RunResult:
    """Result of a pre-training or distillation run.

    Attributes:
        out: Run folder.
        student: ``student.pth``.
        metrics: ``metrics.jsonl``.
        steps: Optimizer steps.
        seconds: Training time of all sessions.
        losses: Losses of the last step.
        val: (step, held-out loss).
        skipped: Damaged photo -> how often it was skipped.
        relations: Student block and heads of the relations it learned, or None.
    """

    out: Path
    student: Path
    metrics: Path
    steps: int
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    val: list[tuple[int, float]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    relations: tuple[int, int] | None = None


def pretrain(recipe: str = "mae_tiny", **settings: Any) -> RunResult:
    """Pre-train a masked autoencoder; ``student.pth`` holds its encoder, ready to be a teacher.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: Fields of :class:`~tinymim.engine.settings.PretrainSettings`; ``data`` is needed.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    return run_job(PretrainJob, recipe, settings)


def distill(recipe: str = "tinymim_tiny_from_mae_base", **settings: Any) -> RunResult:
    """Distil a student from a teacher (TinyMIM): by token relations, or any other target of its study.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: Fields of :class:`~tinymim.engine.settings.DistillSettings`; ``data`` is needed.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    return run_job(DistillJob, recipe, settings)


class PretrainJob(Job):
    """Any :class:`~tinymim.distill.method.Method` on photos without labels."""

    verb = "pretrain"
    settings_type = PretrainSettings
    product = "student.pth"
    settings: PretrainSettings
    model: PretrainModel

    def read_data(self) -> int:
        s = self.settings
        self.files = list_photos(s.data)
        self.held_out = list_photos(s.val_data) if s.val_data else []
        self.probe = read_probe(s.probe_data, self.config.probe_photos) if s.probe_data else None
        return len(self.files)

    def more_settings(self) -> dict[str, Any]:
        s = self.settings
        start = None if s.init_from is None else str(s.init_from)
        return {"probe_data": str(s.probe_data or ""), "init_from": start, "photos": len(self.files)}

    def make_model(self, autocast: torch.dtype | None) -> PretrainModel:
        self.method, self.teachers = build_method(self.config, pretrained=not self.settings.dry_run)
        if self.settings.init_from and self.state is None:
            self.method.start_from(self.settings.init_from)
        if self.method.augmentation is not None:
            self.check_views(self.method.augmentation)
        model = PretrainModel(self.method, autocast=autocast, photo=self.files[0])
        if self.method.calibrates:
            if self.place != "cpu":
                raise ConfigError(
                    f"teacher_precision=int8 on {self.place}",
                    "8-bit products run on the CPU only",
                    "use auto, or --device cpu",
                )
            some = [self.files[len(self.files) * i // CALIBRATION] for i in range(CALIBRATION)]
            shown = self.photos(train=False, files=some)
            batch = collate_readable([shown[(0, i)] for i in range(CALIBRATION)])
            if "image" not in batch:
                raise ConfigError(
                    f"{len(some)} photos of {self.settings.data}", "none of them can be read", "check the files"
                )
            model.calibrate(autocast or torch.float32, batch["image"])
        return model

    @property
    def patch_size(self) -> int:
        return int(self.method.student.patch_size)

    def check_views(self, augmentation: Mapping[str, Any]) -> None:
        """Refuse photos and settings with which the views of stored targets, or pairs of views, cannot be made.

        Raises:
            ConfigError: colour jitter, held-out photos of a store, another augmentation than its own, or pairs that
                would be torn apart.
            DataError: photos or epochs that are not in the store, or views that are not ours.
        """
        plan, stored = self.arithmetic, self.method.stored
        if stored is not None and {*stored.augmentation} != {*Replay().settings}:
            raise DataError(
                f"the views of {stored.source} cannot be made again",
                f"they are of another program: {stored.augmentation}",
                "write a store with tinymim cache",
            )
        self.replay = replay = Replay(**augmentation)
        if self.config.color_jitter and not self.method.recoloured:
            raise ConfigError(
                f"color_jitter={self.config.color_jitter} for views that are made from seeds",
                "teacher and student see the same pixels",
                "use --cfg-options color_jitter=0",
            )
        if stored is not None and self.held_out:
            raise ConfigError(
                f"--val-data {self.settings.val_data} and stored targets",
                "the store holds none of held-out photos",
                "leave --val-data out; labelled photos are scored with --probe-data FOLDER",
            )
        for name, value in replay.settings.items() if stored is not None else ():
            if value != (found := Replay(**stored.augmentation).settings[name]):
                text = "none" if found is None else str(found).replace(" ", "")
                words = {"img_size": f"--img-size {text}", "scale": f"--cfg-options crop_scale={text}"}
                raise ConfigError(
                    f"{stored.source} was made with {name} {found}, and the run has {value}",
                    "its targets belong to other views",
                    f"use {words.get(name, f'--cfg-options {name}={text}')}, or another --store",
                )
        share = plan.batch // self.world
        if replay.mixes and share % 2 and (self.world > 1 or plan.batch < plan.photos):
            raise ConfigError(
                f"{share} photos per process cannot be mixed",
                "they are mixed in pairs",
                f"use --batch-size {self.world * max(share // 2 * 2, 2)}",
            )
        self.keys = photo_names(self.settings.data, self.files)
        if stored is not None:
            stored.check([*self.keys.values()], -(-plan.steps // plan.steps_per_epoch))

    def photos(self, train: bool = True, files: list[Path] | None = None) -> Photos | ReplayedPhotos:
        """Views of the training photos, or central crops of the held-out ones or of those given."""
        if train and self.method.augmentation is not None:
            stored = self.method.stored
            return ReplayedPhotos(
                self.files,
                self.keys,
                self.replay,
                stored,
                seed=self.config.seed,
                jitter=self.config.color_jitter if self.method.recoloured else None,
                jitter_later=self.place != "cpu",
            )
        return Photos(
            files or (self.files if train else self.held_out),
            img_size=self.config.img_size,
            scale=tuple(self.config.crop_scale),
            jitter=self.config.color_jitter,
            seed=self.config.seed,
            train=train,
            extra=self.method.per_photo,
            decode=self.config.decode,
            jitter_later=train and self.place != "cpu",
        )

    def val_loader(self) -> DataLoader | None:
        if not self.held_out:
            return None
        start, stop = (len(self.held_out) * i // self.world for i in (self.rank, self.rank + 1))
        return DataLoader(
            self.photos(train=False),
            sampler=[(0, i) for i in range(start, stop)],  # type: ignore[arg-type]
            batch_size=min(self.arithmetic.micro_batch, len(self.held_out)),
            num_workers=0,
            collate_fn=collate_readable,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.config.weight_decay, self.method.undecayed())

    def hooks_before(self, optimizer: torch.optim.Optimizer) -> list[Hook]:
        plan = self.arithmetic
        return [ScheduleHook(plan.steps, plan.warmup, plan.peak_lr, self.config.min_lr)]

    def hooks_after(self) -> list[Hook]:
        every = self.arithmetic.steps_per_epoch
        return health_hooks(self.folder, self.config, every, self.held_out or self.files, self.probe)

    def inputs(self) -> dict[str, Any]:
        start, stored = self.settings.init_from, self.method.stored
        return {
            **({} if stored is None else {"store": {"file": stored.source, "sha256": stored.sha256}}),
            "teacher": [{"file": t.name, "sha256": t.sha256} for t in self.teachers],
            "init_from": describe_file(weights_file(start))
            if start and (is_hub(start) or Path(start).exists())
            else None,
            "data": describe_files(self.settings.data, self.files, file_bytes),
        }

    def save(self, network: nn.Module, path: Path, step: int) -> None:
        student: Any = self.method.student
        meta = {
            "name": self.config.student,
            "recipe": Path(self.recipe).stem,
            "method": self.config.method,
            "teacher": " + ".join(t.name for t in self.teachers) or None,
            "teacher_sha256": " + ".join(str(t.sha256) for t in self.teachers) or None,
            "relations": self.method.learned_relations(),
            "steps": self.arithmetic.steps,
        }
        self.method.save(network, path, {**meta, "step": step, "trained_depth": trained_depth(student)})

    def result(self, seconds: float) -> RunResult:
        steps, learned = self.arithmetic.steps, self.method.learned_relations()
        if self.settings.dry_run:
            return RunResult(self.folder, Path(), Path(), steps, seconds, relations=learned)
        return RunResult(
            self.folder,
            self.folder / self.product,
            self.folder / "metrics.jsonl",
            steps,
            seconds,
            self.monitor.last,
            self.monitor.val,
            self.monitor.skipped,
            learned,
        )


class DistillJob(PretrainJob):
    """A :class:`PretrainJob` whose settings can name teachers."""

    verb = "distill"
    settings_type = DistillSettings
    settings: DistillSettings

    def check_recipe(self) -> None:
        named = named_teachers(self.settings.teacher, self.settings.teacher_weights)
        if named.get("teacher") and self.config.get("teachers"):
            raise ConfigError(
                f"--teacher {self.settings.teacher} and the recipe's teachers",
                "teachers are named twice",
                "write it into teachers, or leave --teacher out",
            )

    def check_plan(self) -> None:
        relations = self.config.method == "tinymim" and Path(self.recipe).stem != SMALL_DATA
        if self.settings.dry_run and len(self.files) <= FEW_PHOTOS and relations:
            data = shlex.quote(str(self.settings.data))
            self.arithmetic.notes.append(
                f"{len(self.files)} photos are few: --recipe {SMALL_DATA} has settings chosen for such jobs on a CPU; "
                f"how long it takes: tinymim distill --recipe {SMALL_DATA} --data {data} --dry-run"
            )
