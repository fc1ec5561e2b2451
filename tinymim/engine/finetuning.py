"""``finetune``: train a classifier of your photos on a pre-trained or distilled encoder."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from timm.data import Mixup, create_transform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from tinymim.compat import let_timm_posterize
from tinymim.data.imagenet import ClassFolder, read_class_folder
from tinymim.data.labelled import LabelledPhotos
from tinymim.data.photos import collate_readable, leave_signals_to_the_main_process
from tinymim.data.shards import file_bytes
from tinymim.engine.classify import AverageHook, ClassifyModel, CosineHook, MixupHook
from tinymim.engine.job import Job, run_job
from tinymim.engine.session import data_workers
from tinymim.engine.settings import FinetuneSettings
from tinymim.errors import ConfigError
from tinymim.files import describe_file, describe_files, write_json
from tinymim.models.checkpoints import read_checkpoint
from tinymim.models.classifier import Classifier, save_classifier, start_from_classes
from tinymim.models.logit_teacher import LabelTeacher, load_label_teacher
from tinymim.models.registry import create_model_for
from tinymim.models.weight_files import weights_file


@dataclass
class FinetuneResult:
    """Result of a fine-tuning run; ``top1`` and ``top5`` are fractions of the held-out photos, None without any."""

    out: Path
    classifier: Path
    metrics: Path
    steps: int
    seconds: float
    classes: int
    photos: int
    top1: float | None = None
    top5: float | None = None

    def to_json(self) -> Path:
        """Write ``result.json`` into the run folder; return its path."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        write_json(self.out / "result.json", values)
        return self.out / "result.json"


def finetune(recipe: str = "finetune_tiny", **settings: Any) -> FinetuneResult:
    """Train a classifier; ``classifier.pth`` holds the last weights (or their average), ``result.json`` the scores.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: Fields of :class:`~tinymim.engine.settings.FinetuneSettings`; ``data`` is needed.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    return run_job(FinetuneJob, recipe, settings)


class FinetuneJob(Job):
    """A classifier of labelled photos."""

    verb = "finetune"
    settings_type = FinetuneSettings
    product = "classifier.pth"
    scores = tuple(each.name for each in fields(FinetuneResult))
    settings: FinetuneSettings
    model: ClassifyModel

    def check_recipe(self) -> None:
        if self.config.head and self.settings.student is None and not self.settings.resume:
            raise ConfigError(
                f"head={self.config.head} without a student",
                "the recipe starts from the rows of another classifier",
                "add --student FILE (a classifier.pth, or timm's or the authors' file), or --cfg-options head=",
            )

    def read_data(self) -> int:
        s = self.settings
        self.train = read_class_folder(s.data)
        if self.config.photos_per_class is not None:
            self.train = self.train.some(self.config.photos_per_class, self.config.seed)
        self.held_out = read_class_folder(s.val_data, classes=self.train.classes) if s.val_data else None
        if self.held_out is not None and len(self.held_out.files) < self.world:
            raise ConfigError(
                f"{len(self.held_out.files)} photos to score and {self.world} processes",
                "each process scores its share",
                "give more validation photos, or use fewer processes",
            )
        train_transform(self.config)  # refuses an unknown policy; a resumed run may decode otherwise: see photos
        return len(self.train.files)

    def check_plan(self) -> None:
        self.mixed = self.config.mixup > 0 or self.config.cutmix > 0
        share = self.arithmetic.batch // self.world
        if self.mixed and share % 2:
            raise ConfigError(
                f"{share} photos per process cannot be mixed",
                "mixup takes them in pairs",
                "use an even --batch-size, or --cfg-options mixup=0 cutmix=0",
            )

    def more_settings(self) -> dict[str, Any]:
        student = self.settings.student
        return {
            "student_file": None if student is None else str(student),
            "photos": len(self.train.files),
            "classes": self.train.classes,
        }

    def make_model(self, autocast: torch.dtype | None) -> ClassifyModel:
        config, student = self.config, self.settings.student
        self.network = build_classifier(config, len(self.train.classes), None if student is None else str(student))
        self.started = self.start_head(str(student)) if config.head and student is not None else ""
        self.teacher = _teacher(config, self.network, self.train, pretrained=not self.settings.dry_run)
        return ClassifyModel(
            self.network,
            smoothing=config.smoothing,
            ema_decay=config.ema or None,
            teacher=self.teacher,
            distillation=config.distillation,
            alpha=config.alpha,
            tau=config.tau,
            frozen_bn=bool(config.frozen_bn),
            autocast=autocast,
        )

    def start_head(self, student: str) -> str:
        """Start the classifier from the student file's classes; return a line about it."""
        rows = None if self.config.head == "by_class" else read_rows(self.config.head, len(self.train.classes))
        return start_from_classes(self.network, read_checkpoint(student), self.train.classes, rows)

    @property
    def patch_size(self) -> int:
        return int(self.network.backbone.stage_info[0].stride)

    def describe(self) -> str:
        lines = [str(self.train), str(self.arithmetic), *([self.started] if self.started else [])]
        names = self.train.classes
        if self.held_out is not None and (lacking := sorted({*range(len(names))} - {*self.held_out.labels.tolist()})):
            lines.append(
                f"note: {self.settings.val_data} has no photos of {', '.join(names[i] for i in lacking[:5])}"
                + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
                + f": the score covers {len(names) - len(lacking)} classes"
            )
        return "\n".join(lines)

    def photos(self) -> LabelledPhotos:
        config = self.config
        crop = (config.img_size, tuple(config.crop_scale)) if config.decode == "crop" else None
        return LabelledPhotos(self.train.files, self.train.labels, train_transform(config), config.seed, crop)

    def val_loader(self) -> DataLoader | None:
        if self.held_out is None:
            return None
        return DataLoader(
            LabelledPhotos(
                self.held_out.files,
                self.held_out.labels,
                eval_transform(self.config.img_size, squash=bool(self.config.eval_squash)),
            ),
            sampler=[(0, i) for i in range(self.rank, len(self.held_out.files), self.world)],  # type: ignore[arg-type]
            batch_size=max(self.arithmetic.micro_batch, 1),
            num_workers=(workers := data_workers(self.config, self.place)),
            persistent_workers=workers > 0,
            collate_fn=collate_readable,
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.network.layer_groups(self.config.layer_decay, self.config.weight_decay)

    def hooks_before(self, optimizer: torch.optim.Optimizer) -> list[Hook]:
        config, plan = self.config, self.arithmetic
        hooks: list[Hook] = [CosineHook(optimizer, plan.steps, plan.warmup, config.min_lr)]
        if self.mixed:
            mixup = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.switch_prob,
                label_smoothing=config.smoothing,
                num_classes=len(self.train.classes),
            )
            hooks.append(MixupHook(mixup, config.seed, self.place))
        return [*hooks, *([AverageHook()] if self.model.ema is not None else [])]

    def inputs(self) -> dict[str, Any]:
        s = self.settings
        return {
            "student": describe_file(weights_file(s.student)) if s.student else None,
            "teacher": {"file": self.teacher.name, "sha256": self.teacher.sha256} if self.teacher else None,
            "data": describe_files(s.data, self.train.files, file_bytes),
            "val_data": describe_files(s.val_data, self.held_out.files, file_bytes)
            if s.val_data and self.held_out
            else None,
        }

    def save(self, network: nn.Module, path: Path, step: int) -> None:
        assert isinstance(network, Classifier)
        meta = {
            "recipe": Path(self.recipe).stem,
            "method": self.config.method,
            "teacher": self.teacher.name if self.teacher else None,
            "teacher_sha256": self.teacher.sha256 if self.teacher else None,
            "steps": self.arithmetic.steps,
            "step": step,
            "eval_size": self.config.img_size,
            "eval_squash": bool(self.config.eval_squash),
        }
        save_classifier(network, path, self.train.classes, meta)

    def result(self, seconds: float) -> FinetuneResult:
        steps, classes = self.arithmetic.steps, len(self.train.classes)
        if self.settings.dry_run:
            return FinetuneResult(self.folder, Path(), Path(), steps, seconds, classes, 0)
        found = FinetuneResult(
            self.folder,
            self.folder / self.product,
            self.folder / "metrics.jsonl",
            steps,
            seconds,
            classes,
            self.monitor.val_photos,
            self.monitor.last_val.get("val_top1"),
            self.monitor.last_val.get("val_top5"),
        )
        if self.rank == 0:
            found.to_json()
        return found


def build_classifier(config: Config, num_classes: int, student: str | None) -> Classifier:
    """The classifier of a recipe, with its encoder loaded from a file if one is given.

    Raises:
        TinyMIMError: no such file, an unknown head count, or arguments that contradict the file.
    """
    backbone = create_model_for(
        config.student,
        student,
        img_size=config.img_size,
        num_heads=config.num_heads,
        arguments={"drop_path_rate": float(config.drop_path), **config.student_args},
    )
    backbone.set_grad_checkpointing(bool(config.grad_checkpointing))
    return Classifier(backbone, num_classes)


def read_rows(path: str, count: int) -> list[int]:
    """A text file of one whole number a line: the row of each class in another classifier, -1 for none.

    Args:
        path: The file, e.g. the TinyViT authors' ``imagenet_1kto22k.txt``.
        count: Number of classes.

    Raises:
        ConfigError: no such file, or other content.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").split()
        rows = [int(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"head={path} cannot be read as rows of classes",
            str(error),
            "use head=by_class, or a text file with one whole number a line",
        ) from None
    if len(rows) != count or min(rows, default=0) < -1:
        raise ConfigError(
            f"{path} has {len(rows)} numbers from {min(rows, default=0)} for {count} classes",
            "it must have the row of each class, in the order of the sorted sub-folders, and -1 for none",
            "correct the file, or use head=by_class",
        )
    return rows


def _teacher(config: Config, network: Classifier, photos: ClassFolder, *, pretrained: bool) -> LabelTeacher | None:
    """The teacher of a recipe.

    Raises:
        ConfigError: a distillation token and no teacher for it.
    """
    if config.teacher:
        return load_label_teacher(
            config.teacher,
            photos.classes,
            index=photos.index,
            weights=config.teacher_weights,
            pretrained=pretrained,
        )
    if network.head_dist is not None:
        raise ConfigError(
            f"{config.student} has a distillation token but no teacher for it",
            "no teacher is named",
            "add --teacher timm/regnety_160.deit_in1k, or a classifier.pth of these classes",
        )
    return None


def train_transform(config: Config) -> Any:
    """timm's training augmentation with the settings of a recipe: RGB image -> normalised (3, S, S).

    With ``decode="crop"`` it takes what timm's own crop would give it: :class:`LabelledPhotos` crops while it decodes.

    Raises:
        ConfigError: timm does not know the augmentation policy.
    """
    let_timm_posterize()
    try:
        whole = create_transform(
            config.img_size,
            is_training=True,
            scale=tuple(config.crop_scale),
            auto_augment=config.aa or None,
            color_jitter=config.color_jitter or 0.0,
            interpolation="bicubic",
            re_prob=config.reprob,
            re_mode="pixel",
        )
        return Compose(whole.transforms[1:]) if config.decode == "crop" else whole
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"aa={config.aa!r}",
            f"timm does not know this augmentation ({error})",
            "e.g. --cfg-options aa=rand-m9-mstd0.5-inc1, or aa= for none",
        ) from None


def eval_transform(img_size: int, *, squash: bool = False) -> Any:
    """timm's evaluation view: short side 256 for 224 pixels (above 224: no margin), central crop, bicubic (MAE).

    ``squash``: the whole photo resized to a square, without a crop (timm's ``crop_mode="squash"``; TinyViT at 384).
    """
    if squash:
        return create_transform(img_size, is_training=False, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
    return create_transform(
        img_size, is_training=False, interpolation="bicubic", crop_pct=224 / 256 if img_size <= 224 else 1.0
    )
