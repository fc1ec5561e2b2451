"""``finetune``: a pre-trained or distilled encoder becomes a classifier of your photos."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier
from timm.data import Mixup, create_transform
from torch import nn
from torch.utils.data import DataLoader

from tinymim.compat import let_timm_posterize, use_device
from tinymim.data.imagenet import ClassFolder, read_class_folder
from tinymim.data.labelled import LabelledPhotos
from tinymim.data.photos import collate_readable, leave_signals_to_the_main_process
from tinymim.engine.classify import AverageHook, ClassifyModel, CosineHook, MixupHook
from tinymim.engine.hooks import MonitorHook, SaveHook
from tinymim.engine.model import pick_precision
from tinymim.engine.plan import make_plan, measure, micro_batch, padding
from tinymim.engine.recipe import load_recipe
from tinymim.engine.session import check_folder, join_processes, make_runner, open_folder, train, train_loader
from tinymim.errors import ConfigError
from tinymim.files import describe_file, describe_files, note_output, write_json
from tinymim.models import create_model, load_weights, read_checkpoint
from tinymim.models.classifier import Classifier, save_classifier
from tinymim.models.formats import describe, infer_config
from tinymim.models.registry import SIZES
from tinymim.models.teachers import LabelTeacher, load_label_teacher

SHAPE = ("patch_size", "embed_dim", "depth", "mlp_ratio", "rel_pos_bias", "init_values")  # what a file decides


@dataclass
class FinetuneResult:
    """What a fine-tuning run left behind; ``top1`` and ``top5`` are shares of the held-out photos, None without any."""

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
        """Write ``result.json`` into the run folder."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        write_json(self.out / "result.json", values)
        return self.out / "result.json"


def finetune(
    recipe: str = "finetune_tiny",
    *,
    data: str | Path,
    val_data: str | Path | None = None,
    out: str | Path | None = None,
    student: str | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    img_size: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    save_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    cfg_options: dict[str, Any] | None = None,
) -> FinetuneResult:
    """Train a classifier; ``classifier.pth`` holds the last weights (or their average), ``result.json`` the scores.

    Args:
        recipe: Name of a shipped recipe, or a file.
        data: Photos to train on, one sub-folder a class.
        val_data: Photos to score on, the same sub-folders.
        out: Run folder; None: ``runs/<recipe>``.
        student: Checkpoint of the encoder; None: start from random weights.
        model: Registry name; where a file is given its width, depth and patch size hold.
        num_heads: Heads a block; None: the file's, else the model's. Another number than the file's regroups the same
            weights, as the published runs did (TinyMIM-T was pre-trained with 6 heads and fine-tuned with 3).
        teacher: ``timm/NAME`` or a ``classifier.pth``: DeiT's distillation.
        teacher_weights: File for a timm teacher.
        img_size: Side of the crops, pixels.
        epochs: Passes over the photos.
        batch_size: Global batch.
        lr: Peak rate as it is; None: base_lr * batch / 256.
        max_steps: Stop after so many steps (the schedule is fitted to them).
        workers: Data-loading processes.
        seed: Fixes order, augmentation, mixing, drop path and start values.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        save_every: Steps between checkpoints.
        resume: Go on exactly where the run in ``out`` stopped.
        overwrite: Replace the run in ``out``.
        dry_run: One step, memory and time, no files.
        cfg_options: Dotted recipe keys.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    overrides = dict(
        student=model,
        num_heads=num_heads,
        teacher=teacher,
        teacher_weights=teacher_weights,
        img_size=img_size,
        epochs=epochs,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        save_every=save_every,
    )
    config = load_recipe(recipe, {**overrides, **(cfg_options or {})}, "finetune")
    place = use_device(device)
    options: dict[str, Any] = {}
    rank, world = join_processes(place, options)
    photos = read_class_folder(data)
    held_out = read_class_folder(val_data, classes=photos.classes) if val_data else None
    if held_out is not None and len(held_out.files) < world:
        raise ConfigError(
            f"{len(held_out.files)} photos to score and {world} processes",
            "each one scores its share",
            "give more validation photos, or use fewer processes",
        )
    augment = train_transform(config)
    plan = make_plan(config, len(photos.files), world, lr, max_steps)
    mixed = config.mixup > 0 or config.cutmix > 0
    if mixed and (plan.batch // world) % 2:
        raise ConfigError(
            f"{plan.batch // world} photos a process cannot be mixed",
            "mixup takes them in pairs",
            "use an even --batch-size, or --cfg-options mixup=0 cutmix=0",
        )
    settings = {
        **json.loads(json.dumps(config.to_dict())),
        "data": str(data),
        "val_data": str(val_data or ""),
        "student_file": student,
        "lr": lr,
        "max_steps": max_steps,
        "world": world,
        "photos": len(photos.files),
        "classes": photos.classes,
    }
    folder = Path(out or f"runs/{Path(recipe).stem}")
    state = None if dry_run else check_folder(folder, settings, resume=resume, overwrite=overwrite)

    torch.manual_seed(config.seed)
    autocast, scaled = pick_precision(config.precision, place)
    network = build_classifier(config, len(photos.classes), student)
    master = _teacher(config, network, photos, pretrained=not dry_run)
    wrapped = ClassifyModel(
        network,
        smoothing=config.smoothing,
        ema_decay=config.ema or None,
        teacher=master,
        distillation=config.distillation,
        alpha=config.alpha,
        tau=config.tau,
        autocast=autocast,
    ).to(place)
    if state is not None:
        wrapped.learned.load_state_dict(state["model"])
    plan.micro_batch = state["micro_batch"] if state else micro_batch(config, wrapped, plan.batch // world, place)
    plan.notes += padding(config.img_size, network.backbone.patch_size)
    if rank == 0:
        print(f"{photos}\n{plan}")
        if held_out is not None and (lacking := sorted(set(range(len(photos.classes))) - {*held_out.labels.tolist()})):
            print(
                f"note: {val_data} has no photos of {', '.join(photos.classes[i] for i in lacking[:5])}"
                + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
                + f": the score is over {len(photos.classes) - len(lacking)} classes"
            )
    if dry_run:
        measure(wrapped, config, plan, place)
        return FinetuneResult(folder, Path(), Path(), plan.steps, 0.0, len(photos.classes), 0)

    start = int(state["step"]) if state else 0
    labelled = LabelledPhotos(photos.files, photos.labels, augment, config.seed)
    loader = train_loader(labelled, plan, config, place, start=start, rank=rank, world=world)
    val_loader = None
    if held_out is not None:
        val_loader = DataLoader(
            LabelledPhotos(held_out.files, held_out.labels, eval_transform(config.img_size)),
            sampler=[(0, i) for i in range(rank, len(held_out.files), world)],  # type: ignore[arg-type]
            batch_size=max(plan.micro_batch, 1),
            num_workers=config.workers,
            collate_fn=collate_readable,
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def write_classifier(model: nn.Module, step: int) -> None:
        assert isinstance(model, Classifier)
        save_classifier(
            model,
            folder / "classifier.pth",
            photos.classes,
            {
                "recipe": Path(recipe).stem,
                "method": "finetune",
                "teacher": master.name if master else None,
                "teacher_sha256": master.sha256 if master else None,
                "steps": plan.steps,
                "step": step,
                "eval_size": config.img_size,
            },
        )
        note_output(folder, "classifier.pth")

    optimizer = torch.optim.AdamW(
        network.layer_groups(config.layer_decay, config.weight_decay), lr=plan.peak_lr, betas=tuple(config.betas)
    )
    mixup = (
        Mixup(
            config.mixup,
            config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.switch_prob,
            label_smoothing=config.smoothing,
            num_classes=len(photos.classes),
        )
        if mixed
        else None
    )
    monitor = MonitorHook(
        folder, "fine-tune", 1 if place == "cpu" else 10, val_loader, config.val_every or plan.steps_per_epoch
    )
    hooks = [
        CosineHook(optimizer, plan.steps, plan.warmup, config.min_lr),
        *([MixupHook(mixup, config.seed, place)] if mixup else []),
        *([AverageHook()] if wrapped.ema is not None else []),
        monitor,
        SaveHook(folder, config.save_every or plan.steps_per_epoch, write_classifier, state, plan.micro_batch),
    ]
    if rank == 0:
        open_folder(
            folder,
            settings,
            {
                "student": describe_file(student) if student else None,
                "teacher": {"file": master.name, "sha256": master.sha256} if master else None,
                "data": describe_files(data, photos.files),
                "val_data": describe_files(val_data, held_out.files) if val_data and held_out else None,
            },
            resume=resume,
            overwrite=overwrite,
        )
    barrier()
    runner = make_runner(
        folder, wrapped, loader, plan, config, optimizer, hooks, scaled=scaled, start=start, options=options
    )
    seconds = train(runner, folder) + (state or {}).get("seconds", 0.0)
    scores = monitor.last_val
    result = FinetuneResult(
        folder,
        folder / "classifier.pth",
        folder / "metrics.jsonl",
        plan.steps,
        seconds,
        len(photos.classes),
        monitor.val_photos,
        scores.get("val_top1"),
        scores.get("val_top5"),
    )
    if rank == 0:
        result.to_json()
    return result


def build_classifier(config: Config, num_classes: int, student: str | None) -> Classifier:
    """The classifier of a recipe, its encoder loaded from a file if one is given.

    Raises:
        TinyMIMError: no such file, one whose head count nobody knows, or arguments that contradict it.
    """
    shape: dict[str, Any] = dict(config.student_args)
    checkpoint = read_checkpoint(student) if student else None
    if checkpoint is not None:
        told = checkpoint.config or infer_config(checkpoint.state) or {}
        named = {"depth": 12, **SIZES[config.student], **shape}
        if wrong := [key for key in SHAPE if key in shape and key in told and shape[key] != told[key]]:
            raise ConfigError(
                f"student_args.{wrong[0]}={shape[wrong[0]]} is not the student's",
                f"{student} has {told[wrong[0]]}",
                f"leave student_args.{wrong[0]} out: the file says it",
            )
        shape |= {key: told[key] for key in SHAPE if key in told}
        heads = told.get("num_heads")
        same = all(told.get(key, named[key]) == named[key] for key in ("embed_dim", "depth"))
        if not same:
            print(f"note: {student} is {describe(checkpoint.state, told)}; its shape holds, not {config.student}'s")
        if heads is None and told.get("embed_dim") == named["embed_dim"]:
            heads = named["num_heads"]  # a published file, and a model of its size was named
        if heads is None and config.num_heads is None:
            raise ConfigError(
                f"the head count of {student} is unknown",
                f"weights cannot tell it; the file looks like {describe(checkpoint.state)}",
                "add --num-heads N (usual: 3 at width 192, 6 at 384, 12 at 768, 16 at 1024)",
            )
        if heads and config.num_heads and heads != config.num_heads:
            print(f"note: {student} has {heads} heads a block; its weights are regrouped to {config.num_heads}")
            checkpoint.config["num_heads"] = config.num_heads
        shape["num_heads"] = config.num_heads or heads
    elif config.num_heads:
        shape["num_heads"] = config.num_heads
    backbone = create_model(config.student, img_size=config.img_size, drop_path_rate=float(config.drop_path), **shape)
    backbone.set_grad_checkpointing(bool(config.grad_checkpointing))
    if checkpoint is not None:
        load_weights(backbone, checkpoint, new_dist_token=backbone.dist_token is not None)
    return Classifier(backbone, num_classes)


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
            img_size=config.img_size,
            weights=config.teacher_weights,
            pretrained=pretrained,
        )
    if network.head_dist is not None:
        raise ConfigError(
            f"{config.student} has a distillation token and nobody to teach it",
            "no teacher is named",
            "add --teacher timm/regnety_160.deit_in1k, or a classifier.pth of these classes",
        )
    return None


def train_transform(config: Config) -> Any:
    """timm's training augmentation with a recipe's words.

    Raises:
        ConfigError: a word for RandAugment or the like that timm does not know.
    """
    let_timm_posterize()
    try:
        return create_transform(
            config.img_size,
            is_training=True,
            scale=tuple(config.crop_scale),
            auto_augment=config.aa or None,
            color_jitter=config.color_jitter or 0.0,
            interpolation="bicubic",
            re_prob=config.reprob,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"aa={config.aa!r}",
            f"timm knows no such augmentation ({error})",
            "e.g. --cfg-options aa=rand-m9-mstd0.5-inc1, or aa= for none",
        ) from None


def eval_transform(img_size: int) -> Any:
    """timm's evaluation view: short side 256 for 224 pixels (larger sizes: no margin), central crop, bicubic (MAE)."""
    return create_transform(
        img_size, is_training=False, interpolation="bicubic", crop_pct=224 / 256 if img_size <= 224 else 1.0
    )
