"""Train and test a segmentor: the functions of ``tinymim segment``."""

# ruff: noqa: PT028  (test_segmentor is not a pytest function)

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from tinymim import compat
from tinymim.engine.log_backends import check_backends, log_hooks
from tinymim.engine.parallel import together
from tinymim.engine.run_folder import RunFolder, bare, on_first_process
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.folders import OpenRun, open_run
from tinymim.literals import read_literal_file
from tinymim.models.weight_files import weights_file
from tinymim.progress import Progress
from tinymim.seg.checks import check_batch
from tinymim.seg.config import (
    building,
    find_config,
    merge_options,
    model_outline,
    name_run,
    say,
    set_data,
    set_device,
    set_pseudo,
)
from tinymim.seg.distillation import load_teacher, set_teacher
from tinymim.seg.hooks import BEST
from tinymim.seg.inference import batched, predict
from tinymim.seg.loop import stop_loader
from tinymim.seg.metric import SegMetric, SegResult
from tinymim.seg.options import length_options, set_balance, set_size
from tinymim.seg.predictions import PredictionsHook
from tinymim.seg.resume import SegRunner, check_input, check_unchanged
from tinymim.seg.segmentor import class_names, load_segmentor
from tinymim.seg.shape import take_shape


def train_segmentor(
    config: str | Path | Config,
    *,
    work_dir: str | Path,
    data_root: str | Path | None = None,
    student: str | Path | None = None,
    teacher_segmentor: str | Path | None = None,
    pseudo: str | Path | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    img_size: int | Sequence[int] | None = None,
    balance: str | None = None,
    patience: int | None = None,
    log: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    amp: bool = False,
    strategy: str | None = None,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
) -> SegResult:
    """Train a segmentor with MMEngine's Runner and score it on the validation photos.

    Args:
        config: File or name of a config, or a ``Config``.
        work_dir: Run folder: config.py, env.json, metrics.jsonl, checkpoints/, segmentor.pth.
        data_root: Labelled folder; default: the config's.
        student: File with the backbone's weights, any that ``tinymim.load_weights`` reads.
        teacher_segmentor: A trained segmentor's file, whose logits are learned beside the labels; its classes are the
            data's, in any order. Its losses' weights are ``teacher.kl`` and ``teacher.channel`` of the config.
        pseudo: ``LAYOUT`` or ``LAYOUT=WEIGHT``: training photos of a folder that ``tinymim label`` wrote are added; one
            of them is drawn WEIGHT times as often as a labelled one (default 1).
        epochs: Passes over the training photos, in place of the config's steps.
        max_steps: Optimizer steps, in place of the config's.
        batch_size: Global batch, split over the processes.
        lr: Peak learning rate.
        img_size: Side of the training crops, or (height, width), pixels; the sizes that photos are resized to follow.
        balance: "weights": rare classes count more; "ohem": hard pixels only (:func:`tinymim.seg.options.set_balance`).
        patience: Stop after so many validations in a row without a better mIoU.
        log: Also log to these: see :data:`tinymim.engine.log_backends.BACKENDS`.
        resume: Continue exactly from the last checkpoint in ``work_dir``.
        overwrite: Empty ``work_dir`` first.
        amp: Mixed precision: bfloat16 on CPUs and on GPUs that have it, else float16.
        strategy: Of several processes: "ddp" (None), or "fsdp", which shards weights and moments.
        device: "cpu", "cuda", "cuda:N"; default: a GPU if there is one.
        cfg_options: Overrides of the config, ``{"optim_wrapper.optimizer.lr": 1e-3}``.
        ignore_label: Id or ids to ignore, for folders without ``dataset.json``.
        reduce_zero_label: Whether id 0 is "no class", for folders without ``dataset.json``.

    Returns:
        Scores of the trained model, with the paths of its files (``.segmentor``, ``.metrics``, ``.work_dir``; ``.best``
        where an earlier validation was better).

    Raises:
        TinyMIMError: anything the user can fix (data, options, weights, a full disk).
        CheckFailed: the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    cfg = find_config(config)
    set_size(cfg, img_size)
    merge_options(cfg, cfg_options)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label)
    added, photos = set_pseudo(cfg, layout, pseudo)
    options = length_options(cfg, photos, epochs=epochs, max_steps=max_steps, batch_size=batch_size, lr=lr)
    if patience is not None:
        options["default_hooks.checkpoint.patience"] = patience
    if options:  # else the config was checked above
        merge_options(cfg, options)
    set_balance(cfg, balance, layout)
    backends = check_backends(log)
    if student is not None:
        student = weights_file(student)
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(student))
    take_shape(cfg, student, Path(work_dir) if resume else None)
    set_teacher(cfg, teacher_segmentor)
    kind = set_device(cfg, device, amp, strategy)
    check_batch(cfg, model_outline(cfg))
    folder = Path(work_dir)
    with together(), ExitStack() as held:
        opened = _open_folder(held, cfg, folder, resume=resume, overwrite=overwrite)
        say(f"data: {layout}{added}")
        batch, world = cfg.train_dataloader.batch_size, compat.launched_processes()
        teacher = load_teacher(cfg, layout, kind)
        say(f"{kind}: {world} process(es) x batch {batch} = {world * batch} photos per step -> {folder}")
        with _our_errors():
            with building("run"):
                runner = SegRunner.from_cfg(name_run(cfg))
                assert runner.train_loop is not None  # builds the data loader
                runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            if teacher is not None:
                teacher.teach(bare(runner.model))
            if opened is not None:
                runner.opened = opened
            runner.register_hook(PredictionsHook())
            for hook in log_hooks(backends, folder):
                runner.register_hook(hook, priority="LOWEST")  # after the line has been written
            runner.train()
            metric = next(m for m in runner.val_evaluator.metrics if isinstance(m, SegMetric))
            if metric.last is None:  # resumed after the last step
                runner.val_loop.run()
                stop_loader(runner.val_loop.dataloader)
        assert metric.last is not None
        result = metric.last
        result.files = {
            name: str(folder / file)
            for name, file in (("work_dir", ""), ("segmentor", "segmentor.pth"), ("metrics", "metrics.jsonl"))
        }
        if (folder / BEST).is_file():
            result.files["best"] = str(folder / BEST)
        if is_main_process():
            result.sha256 = sha256_file(result.segmentor)
            result.to_json(folder / "result.json")
        return result


def test_segmentor(
    config: str | Path | Config | None,
    checkpoint: str | Path,
    *,
    data_root: str | Path | None = None,
    tta: bool = False,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
) -> SegResult:
    """Score a segmentor on validation photos: logits resized to the photo's size, then argmax, every pixel counted.

    Args:
        config: File or name; None: the one stored in ``checkpoint``.
        checkpoint: ``segmentor.pth``, ``iter_N.pth``, or a segmentor's folder or name on the hub.
        data_root: Labelled folder; default: the config's.
        tta: Average over sizes and mirror images (the config's ``tta_pipeline``).
        device: As in :func:`train_segmentor`.
        cfg_options: Overrides of the config.
        ignore_label: As in :func:`train_segmentor`.
        reduce_zero_label: As in :func:`train_segmentor`.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    checkpoint = weights_file(checkpoint)
    model, cfg = load_segmentor(checkpoint, config)
    merge_options(cfg, cfg_options)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label, splits=("val",))
    order, remark = layout.match(str(checkpoint), class_names(model))
    kind = set_device(cfg, device, amp=False)
    if compat.launched_processes() > 1 and kind == "cuda":
        from mmengine.dist import init_dist, is_distributed

        if not is_distributed():
            init_dist("pytorch")
    say(f"data: {layout}" + (f"\nnote: {checkpoint}: {remark}" if remark else ""))
    init_default_scope("mmseg")
    loader_cfg = batched(cfg.val_dataloader)
    step: Callable[[Any], Any] = functools.partial(predict, model)
    if tta:
        from mmseg.models import SegTTAModel

        loader_cfg = {**cfg.val_dataloader, "batch_size": 1}  # photos of one batch would have to be of one size
        loader_cfg["dataset"]["pipeline"] = cfg.tta_pipeline
        model = SegTTAModel(module=model)
        step = model.test_step
    model = model.to(kind).eval()
    metric = SegMetric()
    metric.order = order
    with _our_errors():
        with building("test data"):
            loader = Runner.build_dataloader(loader_cfg, seed=0)
        metric.dataset_meta = loader.dataset.metainfo
        progress = Progress("test", len(loader)) if is_main_process() else None
        for i, batch in enumerate(loader):
            with torch.inference_mode():
                samples = step(batch)
            metric.process(batch, [sample.to_dict() for sample in samples])
            if progress is not None:
                progress.update(i + 1, images=len(samples) * get_world_size())
        if progress is not None:
            progress.close()
        stop_loader(loader)
        metric.evaluate(len(loader.dataset))
    assert metric.last is not None
    metric.last.sha256 = sha256_file(checkpoint)
    return metric.last


setattr(test_segmentor, "__test__", False)  # noqa: B010  (pytest would collect it where it is imported)


def _open_folder(held: ExitStack, cfg: Config, work_dir: Path, *, resume: bool, overwrite: bool) -> OpenRun | None:
    """Hold the run folder (the first process does); set the checkpoint or the student that ``cfg`` starts from, and the
    teacher of a run that is resumed.

    Raises:
        ConfigError: the folder is in use, or the options are not the run's.
    """
    if compat.launched_processes() > 1 and not torch.distributed.is_initialized():
        from mmengine.dist import init_dist

        init_dist("pytorch")
    opened: OpenRun | None = None

    def hold() -> tuple[str | None, Any, Any]:
        nonlocal opened
        opened = held.enter_context(open_run(work_dir, resume=resume, overwrite=overwrite, option="--work-dir"))
        return (None, None, cfg.get("teacher")) if opened.fresh else _start(cfg, work_dir)

    checkpoint, student, teacher = on_first_process(hold)
    if teacher:
        cfg.teacher = teacher
    cfg.work_dir, cfg.resume, cfg.load_from = str(work_dir), checkpoint is not None, checkpoint
    if cfg.resume:
        cfg.model.backbone.init_cfg = None  # every weight comes from the checkpoint
    elif student is not None and not cfg.model.backbone.get("init_cfg"):
        cfg.model.backbone.init_cfg = student
        say(f"student: {student.get('checkpoint')}, as the run was started with")
    return opened


def _start(cfg: Config, work_dir: Path) -> tuple[str | None, Any, Any]:
    """Where a resumed run goes on: its newest checkpoint, or None and the ``init_cfg`` that it began with; its teacher.

    Raises:
        ConfigError: the folder holds no run, another kind of run, or one with other options.
        CheckpointError: every checkpoint is damaged, or the student is gone.
    """
    if not (work_dir / "config.py").is_file():
        raise ConfigError(f"{work_dir} holds no run to resume", "config.py is missing", "leave --resume out")
    before = Config(read_literal_file(work_dir / "config.py"))
    taught = before.get("teacher")
    if isinstance(taught, dict) and not (cfg.get("teacher") or {}).get("checkpoint"):
        set_teacher(cfg, taught.get("checkpoint"))
    if said := check_unchanged(before, cfg, work_dir):
        say(f"changed since the run began: {'; '.join(said)}")
    given, student, teacher = _student(cfg), _student(before), cfg.get("teacher")
    if given and Path(given["checkpoint"]).is_file():
        check_input(work_dir, "student", Path(given["checkpoint"]), "--student")
    if teacher and teacher.checkpoint and Path(teacher.checkpoint).is_file():
        check_input(work_dir, "teacher", Path(teacher.checkpoint), "--teacher-segmentor")
    newest = RunFolder(work_dir, "iter").newest()
    if newest is not None:
        return str(newest), None, teacher
    if student and not given and not Path(student["checkpoint"]).is_file():
        raise CheckpointError(
            f"no checkpoint at {student['checkpoint']}",
            "the run was started with this student and stopped before its first checkpoint",
            "add --student FILE",
        )
    return None, student, teacher


def _student(cfg: Config) -> dict[str, Any] | None:
    """The backbone's ``init_cfg``, if it names a file."""
    found = cfg.model.backbone.get("init_cfg") or {}
    return dict(found) if isinstance(found, dict) and isinstance(found.get("checkpoint"), str) else None


@contextmanager
def _our_errors() -> Iterator[None]:
    """Restore our own errors that PyTorch's data workers turned into text; hide MMSegmentation's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mm(seg|engine|cv)\.")
            yield
    except RuntimeError as error:
        found = re.search(r"(?:DataError|UnreadablePhoto): (.*?)\n  why: (.*?)\n  fix: (.*)", str(error), re.DOTALL)
        if found is None:
            raise
        raise DataError(*(part.strip() for part in found.groups())) from error
