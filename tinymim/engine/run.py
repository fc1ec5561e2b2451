"""Recipe -> MMEngine Runner: ``pretrain`` and ``distill``, the two long jobs, and what they return."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier
from torch import nn
from torch.utils.data import DataLoader

from tinymim.analysis.probes import trained_depth
from tinymim.compat import use_device
from tinymim.data.photos import Photos, collate_readable, list_photos
from tinymim.distill.method import find_method
from tinymim.distill.teachers import named_teachers
from tinymim.engine.build import build_method
from tinymim.engine.health import read_probe, watch_hooks
from tinymim.engine.hooks import MonitorHook, SaveHook, ScheduleHook
from tinymim.engine.model import PretrainModel, parameter_groups, pick_precision
from tinymim.engine.plan import make_plan, measure, micro_batch, padding
from tinymim.engine.recipe import load_recipe
from tinymim.engine.session import check_folder, join_processes, make_runner, open_folder, train, train_loader
from tinymim.errors import ConfigError
from tinymim.files import describe_file, describe_files, note_output
from tinymim.models import ViT, load_weights, save_student


@dataclass
class RunResult:
    """What a pre-training or distillation run left behind."""

    out: Path
    student: Path
    metrics: Path
    steps: int
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    val: list[tuple[int, float]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    relations: tuple[int, int] | None = None  # student block and heads of the relations it learned


def pretrain(recipe: str = "mae_tiny", **options: Any) -> RunResult:
    """Pre-train a masked autoencoder; ``student.pth`` holds its encoder, ready to be a teacher.

    Keywords and errors: :func:`run`.
    """
    return run(recipe, "pretrain", **options)


def distill(recipe: str = "tinymim_tiny_from_mae_base", **options: Any) -> RunResult:
    """Distil a student from a teacher (TinyMIM): by token relations, or any other target of its study.

    Keywords and errors: :func:`run`.
    """
    return run(recipe, "distill", **options)


def run(
    recipe: str,
    verb: str,
    *,
    data: str | Path,
    out: str | Path | None = None,
    val_data: str | Path | None = None,
    probe_data: str | Path | None = None,
    teacher: str | Sequence[str] | None = None,
    teacher_weights: str | Sequence[str] | None = None,
    teacher_heads: int | None = None,
    targets: list[str] | None = None,
    student: str | None = None,
    model: str | None = None,
    img_size: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    init_from: str | None = None,
    save_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    cfg_options: dict[str, Any] | None = None,
    title: str | None = None,
) -> RunResult:
    """Run a recipe; what the two verbs share.

    Args:
        recipe: Name of a shipped recipe, or a file.
        verb: "pretrain" or "distill"; the recipe's method must be of it.
        data: Folder of photos, searched recursively.
        out: Run folder; None: ``runs/<recipe>``.
        val_data: Folder of held-out photos for ``val_loss``.
        probe_data: Folder with a sub-folder a class, or with such folders train and val: k-NN and linear probe.
        teacher: ``timm/NAME`` or a checkpoint; several, each ``NAME`` or ``NAME=WEIGHT``, teach at once.
        teacher_weights: File for a timm teacher; for several one each, "-" where there is none.
        teacher_heads: Heads of a teacher file that does not say.
        targets: Words of :mod:`tinymim.distill.targets`.
        student: Registry name; ``model`` is the same word for pretrain.
        model: See ``student``.
        img_size: Side of the crops, pixels.
        epochs: Passes over the photos.
        batch_size: Global batch.
        lr: Peak rate as it is; None: base_lr * batch / 256.
        max_steps: Stop after so many steps (the schedule is fitted to them).
        workers: Data-loading processes.
        seed: Fixes order, crops, masks, drop path and start values.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        init_from: Checkpoint to start the student from.
        save_every: Steps between checkpoints.
        resume: Go on exactly where the run in ``out`` stopped.
        overwrite: Replace the run in ``out``.
        dry_run: One step, memory and time, no files.
        cfg_options: Dotted recipe keys.
        title: Start of the live line.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    overrides = dict(
        **named_teachers(teacher, teacher_weights),
        teacher_heads=teacher_heads,
        student=student or model,
        img_size=img_size,
        epochs=epochs,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        save_every=save_every,
        targets=targets,
    )
    config = load_recipe(recipe, {**overrides, **(cfg_options or {})}, verb)
    if teacher and config.get("teachers") and not overrides.get("teachers"):
        raise ConfigError(
            f"--teacher {teacher} and the recipe's teachers",
            "they are named twice",
            "write it into teachers, or leave --teacher out",
        )
    place = use_device(device)
    options: dict[str, Any] = {}
    rank, world = join_processes(place, options)
    photos = list_photos(data)
    held_out = list_photos(val_data) if val_data else []
    probe = read_probe(probe_data, config.probe_photos) if probe_data else None
    plan = make_plan(config, len(photos), world, lr, max_steps)
    settings = {
        **json.loads(json.dumps(config.to_dict())),
        "data": str(data),
        "val_data": str(val_data or ""),
        "probe_data": str(probe_data or ""),
        "init_from": init_from,
        "lr": lr,
        "max_steps": max_steps,
        "world": world,
        "photos": len(photos),
    }
    folder = Path(out or f"runs/{Path(recipe).stem}")
    state = None if dry_run else check_folder(folder, settings, resume=resume, overwrite=overwrite)

    torch.manual_seed(config.seed)
    autocast, scaled = pick_precision(config.precision, place)
    network, teachers = build_method(config, pretrained=not dry_run)
    if init_from and state is None:
        load_weights(network.student, init_from)
    wrapped = PretrainModel(network, autocast=autocast, photo=photos[0]).to(place)
    if state is not None:
        wrapped.learned.load_state_dict(state["model"])
    plan.micro_batch = state["micro_batch"] if state else micro_batch(config, wrapped, plan.batch // world, place)
    plan.notes += padding(config.img_size, wrapped.encoder.patch_size)  # type: ignore[arg-type]
    if rank == 0:
        print(plan)
    if dry_run:
        measure(wrapped, config, plan, place)
        return RunResult(folder, Path(), Path(), plan.steps, 0.0, relations=network.learned_relations())

    data_args = dict(
        img_size=config.img_size, scale=tuple(config.crop_scale), jitter=config.color_jitter, seed=config.seed
    )
    start = int(state["step"]) if state else 0
    photos_on_disk = Photos(photos, **data_args, extra=network.per_photo)  # type: ignore[arg-type]
    loader = train_loader(photos_on_disk, plan, config, place, start=start, rank=rank, world=world)
    val_loader = None
    if held_out:
        val_loader = DataLoader(
            Photos(held_out, **data_args, train=False, extra=network.per_photo),  # type: ignore[arg-type]
            sampler=[(0, i) for i in range(len(held_out))],  # type: ignore[arg-type]
            batch_size=min(plan.micro_batch, len(held_out)),
            num_workers=0,
            collate_fn=collate_readable,
        )
    meta = {
        "name": config.student,
        "recipe": Path(recipe).stem,
        "method": config.method,
        "teacher": " + ".join(t.name for t in teachers) or None,
        "teacher_sha256": " + ".join(str(t.sha256) for t in teachers) or None,
        "relations": network.learned_relations(),
        "steps": plan.steps,
    }

    def write_student(encoder: nn.Module, step: int) -> None:
        assert isinstance(encoder, ViT)
        save_student(encoder, folder / "student.pth", {**meta, "step": step, "trained_depth": trained_depth(encoder)})
        note_output(folder, "student.pth")

    title = title or find_method(config.method).title
    monitor = MonitorHook(
        folder, title, 1 if place == "cpu" else 10, val_loader, config.val_every or plan.steps_per_epoch
    )
    watching = watch_hooks(folder, config, plan.steps_per_epoch, held_out or photos, probe)
    saver = SaveHook(folder, config.save_every or plan.steps_per_epoch, write_student, state, plan.micro_batch)
    if rank == 0:
        open_folder(
            folder,
            settings,
            {
                "teacher": [{"file": t.name, "sha256": t.sha256} for t in teachers],
                "init_from": describe_file(init_from) if init_from and Path(init_from).is_file() else None,
                "data": describe_files(data, photos),
            },
            resume=resume,
            overwrite=overwrite,
        )
    barrier()
    schedule = ScheduleHook(plan.steps, plan.warmup, plan.peak_lr, config.min_lr)
    optimizer = torch.optim.AdamW(
        parameter_groups(wrapped, config.weight_decay), lr=plan.peak_lr, betas=tuple(config.betas)
    )
    hooks = [schedule, monitor, *watching, saver]
    runner = make_runner(
        folder, wrapped, loader, plan, config, optimizer, hooks, scaled=scaled, start=start, options=options
    )
    seconds = train(runner, folder) + (state or {}).get("seconds", 0.0)
    return RunResult(
        folder,
        folder / "student.pth",
        folder / "metrics.jsonl",
        plan.steps,
        seconds,
        monitor.last,
        monitor.val,
        monitor.skipped,
        network.learned_relations(),
    )
