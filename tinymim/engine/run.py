"""Recipe -> MMEngine Runner: ``pretrain`` and ``distill``, the two long jobs, and what they return."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.data import DataLoader

from tinymim.compat import launched_processes, start_cpu_processes, use_device
from tinymim.data.photos import Photos, StepSampler, collate, leave_signals_to_the_main_process, list_photos
from tinymim.distill import TinyMIM
from tinymim.engine.loop import MonitorHook, NonFiniteLoss, SaveHook, dump_bad_batch
from tinymim.engine.model import PretrainModel, parameter_groups, pick_precision
from tinymim.engine.plan import Plan, make_plan, measure, micro_batch
from tinymim.engine.recipe import load_recipe
from tinymim.engine.watch import read_probe, watch_hooks
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import atomic_path, describe_file, describe_files, note_output, prepare_out, write_env
from tinymim.models import ViT, create_model, load_weights, save_student
from tinymim.models.mae import MAE
from tinymim.models.teachers import Teacher, load_teacher, state_sha256

WATCHING = {"watch_every", "probe_data", "probe_photos", "tensorboard"}
MAY_CHANGE = {"workers", "data", "val_data", *WATCHING}  # on resume; everything else would change the numbers
PLACES = {*MAY_CHANGE, "teacher", "teacher_weights", "init_from"}  # env.json names these by content, or not at all


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


def pretrain(recipe: str = "mae_tiny", **options: Any) -> RunResult:
    """Pre-train a masked autoencoder; ``student.pth`` holds its encoder, ready to be a teacher.

    Keywords and errors: :func:`run`.
    """
    return run(recipe, "mae", **options)


def distill(recipe: str = "tinymim_tiny_from_mae_base", **options: Any) -> RunResult:
    """Distil a student from a teacher (TinyMIM): by token relations, or any other target of its study.

    Keywords and errors: :func:`run`.
    """
    return run(recipe, "tinymim", **options)


def run(
    recipe: str,
    method: str,
    *,
    data: str | Path,
    out: str | Path | None = None,
    val_data: str | Path | None = None,
    probe_data: str | Path | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
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
        method: The method the verb stands for ("mae" or "tinymim"); the recipe must agree.
        data: Folder of photos, searched recursively.
        out: Run folder; None: ``runs/<recipe>``.
        val_data: Folder of held-out photos for ``val_loss``.
        probe_data: Folder with a sub-folder a class, or with such folders train and val: k-NN and linear probe.
        teacher: ``timm/NAME`` or a checkpoint.
        teacher_weights: File for a timm teacher.
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
        teacher=teacher, teacher_weights=teacher_weights, teacher_heads=teacher_heads, student=student or model,
        img_size=img_size, epochs=epochs, batch_size=batch_size, workers=workers, seed=seed, save_every=save_every,
        targets=targets,
    )  # fmt: skip
    config = load_recipe(recipe, {**overrides, **(cfg_options or {})})
    if config.method != method:
        verb = "pretrain" if config.method == "mae" else "distill"
        raise ConfigError(f"{recipe} is a {config.method} recipe", "another command runs it", f"tinymim {verb}")
    place = use_device(device)
    options: dict[str, Any] = {}
    rank, world = join_processes(place, options)
    photos = list_photos(data)
    held_out = list_photos(val_data) if val_data else []
    probe = read_probe(probe_data, config.probe_photos) if probe_data else None
    plan = make_plan(config, len(photos), world, lr, max_steps)
    settings = {**json.loads(json.dumps(config.to_dict())), "data": str(data), "val_data": str(val_data or ""),
                "probe_data": str(probe_data or ""), "init_from": init_from, "lr": lr, "max_steps": max_steps,
                "world": world, "photos": len(photos)}  # fmt: skip
    folder = Path(out or f"runs/{Path(recipe).stem}")
    state = None
    if not dry_run:
        if rank == 0:
            prepare_out(folder, resume=resume, overwrite=overwrite)
        barrier()
        state = _resume_state(folder, settings) if resume else None

    torch.manual_seed(config.seed)
    autocast, scaled = pick_precision(config.precision, place)
    network, master = build_method(config, pretrained=not dry_run)
    if init_from and state is None:
        load_weights(network.student if isinstance(network, TinyMIM) else network.encoder, init_from)  # type: ignore[arg-type]
    wrapped = PretrainModel(
        network, autocast=autocast, **({"teacher_mean": master.mean, "teacher_std": master.std} if master else {})
    ).to(place)
    if state is not None:
        wrapped.learned.load_state_dict(state["model"])
    plan.micro_batch = state["micro_batch"] if state else micro_batch(config, wrapped, plan.batch // world, place)
    if rank == 0:
        print(plan)
    if dry_run:
        measure(wrapped, config, plan, place)
        return RunResult(folder, Path(), Path(), plan.steps, 0.0)

    data_args = dict(img_size=config.img_size, scale=tuple(config.crop_scale), jitter=config.color_jitter,
                     seed=config.seed)  # fmt: skip
    start = int(state["step"]) if state else 0
    loader = DataLoader(
        Photos(photos, **data_args),  # type: ignore[arg-type]
        batch_sampler=StepSampler(len(photos), plan.batch, plan.steps, seed=config.seed, start=start, rank=rank,
                                  world=world),
        num_workers=config.workers, collate_fn=collate,
        worker_init_fn=leave_signals_to_the_main_process, pin_memory=place != "cpu",
    )  # fmt: skip
    val_loader = None
    if held_out:
        val_loader = DataLoader(
            Photos(held_out, **data_args, train=False),  # type: ignore[arg-type]
            sampler=[(0, i) for i in range(len(held_out))],  # type: ignore[arg-type]
            batch_size=min(plan.micro_batch, len(held_out)), num_workers=0, collate_fn=collate,
        )  # fmt: skip
    meta = {"name": config.student, "recipe": Path(recipe).stem, "method": method,
            "teacher": master.name if master else None, "teacher_sha256": master.sha256 if master else None,
            "steps": plan.steps}  # fmt: skip

    def write_student(encoder: nn.Module) -> None:
        assert isinstance(encoder, ViT)
        save_student(encoder, folder / "student.pth", meta)
        note_output(folder, "student.pth")

    title = title or ("pre-train" if method == "mae" else "distil")
    monitor = MonitorHook(
        folder, title, 1 if place == "cpu" else 10, val_loader, config.val_every or plan.steps_per_epoch
    )
    watching = watch_hooks(folder, config, plan.steps_per_epoch, held_out or photos, probe)
    saver = SaveHook(folder, config.save_every or plan.steps_per_epoch, write_student, state, plan.micro_batch)
    if rank == 0 and not resume:
        with atomic_path(folder / "config.py") as part:
            part.write_text(f'"""Resolved recipe of this run (tinymim {" ".join(sys.argv[1:])})."""\n\n'
                            + "".join(f"{k} = {v!r}\n" for k, v in settings.items()))  # fmt: skip
        (folder / "plots").mkdir(exist_ok=True)
    if rank == 0:
        write_env(folder, {
            "teacher": {"file": master.name, "sha256": master.sha256} if master else None,
            "init_from": describe_file(init_from) if init_from and Path(init_from).is_file() else None,
            "data": describe_files(data, photos),
            "recipe_sha256": hashlib.sha256(json.dumps({key: value for key, value in settings.items()
                                                        if key not in PLACES}, sort_keys=True).encode()).hexdigest(),
        })  # fmt: skip
    runner = _runner(folder, wrapped, loader, plan, config, scaled, start, [monitor, *watching, saver], options)
    began = time.monotonic()
    try:
        runner.train()
    except NonFiniteLoss as error:
        dump = dump_bad_batch(folder, runner)
        kept = "student.pth and checkpoints/ hold the last good state" if (folder / "student.pth").is_file() else (
            "nothing was saved yet")  # fmt: skip
        raise NonFiniteLoss(f"{error.what} at step {runner.iter}", f"{error.why}; the batch is in {dump}, {kept}",
                            error.fix) from None  # fmt: skip
    return RunResult(folder, folder / "student.pth", folder / "metrics.jsonl", plan.steps, time.monotonic() - began,
                     getattr(monitor, "last", {}), monitor.val, monitor.skipped)  # fmt: skip


def join_processes(place: str, options: dict[str, Any]) -> tuple[int, int]:
    """Rank and number of processes; under torchrun the group is joined (nccl, or gloo on CPU)."""
    if launched_processes() == 1:
        return 0, 1
    if place == "cpu":
        start_cpu_processes(options)
    elif not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def barrier() -> None:
    """Wait for the other processes, if any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def build_method(config: Config, *, pretrained: bool = True) -> tuple[TinyMIM | MAE, Teacher | None]:
    """The method of a recipe, with its teacher.

    Raises:
        TinyMIMError: models that do not fit each other, or a teacher without weights.
    """
    arguments = dict(config.student_args)
    if config.drop_path and "drop_path_rate" not in arguments:
        depth = int(arguments.get("depth", 12))
        arguments["drop_path_rate"] = [float(config.drop_path)] * (depth - 1) + [0.0]
    encoder = create_model(config.student, img_size=config.img_size, **arguments)
    encoder.set_grad_checkpointing(bool(config.grad_checkpointing))
    if config.method == "mae":
        if encoder.num_prefix_tokens != 1 or config.img_size % encoder.patch_size:
            raise ConfigError(
                f"{config.student} at {config.img_size} pixels cannot be masked",
                "MAE needs a class token only and sizes that are whole patches",
                f"use a plain model and a multiple of {encoder.patch_size}",
            )
        d = config.decoder
        return MAE(encoder, decoder_dim=d["dim"], decoder_depth=d["depth"], decoder_heads=d["heads"],
                   mask_ratio=config.mask_ratio, norm_pix=config.norm_pix), None  # fmt: skip
    if config.teacher is None:
        raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
    grid = -(-config.img_size // encoder.patch_size) if config.align == "image" else None
    try:
        teacher = load_teacher(config.teacher, img_size=config.img_size, weights=config.teacher_weights,
                               num_heads=config.teacher_heads, pretrained=pretrained, grid=grid)  # fmt: skip
    except CheckpointError:
        if pretrained or config.teacher.startswith("timm/"):
            raise
        print(f"note: {config.teacher} is not there yet; the dry run measures a stand-in of the next larger size")
        larger = {"tinymim_vit_tiny": "tinymim_vit_small"}.get(config.student, "tinymim_vit_base")
        stand_in = create_model(larger, img_size=config.img_size).eval().requires_grad_(False)
        teacher = Teacher(stand_in, larger, (0.5,) * 3, (0.5,) * 3, None)
    teacher.sha256 = teacher.sha256 or state_sha256(teacher.model)
    d = config.decoder
    decoder = dict(decoder_dim=d["dim"], decoder_depth=d["depth"], decoder_heads=d["heads"], norm_pix=config.norm_pix,
                   weight=config.reconstruct)  # fmt: skip
    method = TinyMIM(
        encoder, teacher.model, targets=config.targets, target_block=config.target_block,
        relation_heads=config.relation_heads, softmax=config.softmax, class_token=config.class_token,
        mask=config.mask, mask_ratio=config.mask_ratio,
        reconstruct=decoder if config.reconstruct else None,
        teacher_drop_path=config.teacher_drop_path, align=config.align,
    )  # fmt: skip
    return method, teacher


def _resume_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint of a run of ours, if the settings are the run's own.

    Raises:
        ConfigError: settings differ, or the folder holds another kind of run.
    """
    if not (folder / "config.py").is_file():
        raise ConfigError(f"{folder} holds no run to resume", "config.py is missing", "leave --resume out")
    before = json.loads(json.dumps(Config.fromfile(folder / "config.py").to_dict()))
    changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings.items()
               if k not in MAY_CHANGE and before.get(k) != v]  # fmt: skip
    if changed:
        raise ConfigError(
            "the settings differ from the run's own",
            "; ".join(changed),
            "resume with the same options, or start a new run with --init-from its student.pth",
        )
    found = sorted((folder / "checkpoints").glob("step_*.pth"))
    if not found:
        print(f"note: {folder} was stopped before its first checkpoint; it starts again from step 0")
        return None
    state = torch.load(found[-1], map_location="cpu", weights_only=True)
    print(f"resuming at step {state['step']}")
    return state


def _runner(
    folder: Path, model: PretrainModel, loader: DataLoader, plan: Plan, config: Config, scaled: bool, start: int,
    hooks: list[Any], options: dict[str, Any],
) -> Any:  # fmt: skip
    from mmengine.optim import AmpOptimWrapper, OptimWrapper
    from mmengine.runner import Runner

    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=tuple(config.betas))
    parts = plan.batch // launched_processes() // plan.micro_batch
    wrapper = dict(optimizer=optimizer, accumulative_counts=parts)
    optim = AmpOptimWrapper(dtype="float16", **wrapper) if scaled else OptimWrapper(**wrapper)  # type: ignore[arg-type]
    schedule = dict(type="ScheduleHook", steps=plan.steps, warmup=plan.warmup, peak=plan.peak_lr, final=config.min_lr)
    off = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))
    return Runner(
        model,
        work_dir=str(folder / "log"),
        train_dataloader=loader,
        train_cfg=dict(
            type="StepLoop", max_iters=plan.steps, start=start, micro_batch=plan.micro_batch, seed=config.seed
        ),
        optim_wrapper=optim,
        default_hooks=off,
        custom_hooks=[schedule, *hooks],
        default_scope="mmengine",
        launcher=options.pop("launcher", "pytorch" if launched_processes() > 1 else "none"),
        randomness=dict(seed=config.seed),
        log_level="ERROR",
        cfg=options,
        experiment_name=folder.name,
    )
