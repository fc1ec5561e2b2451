"""Train and test a segmentor: the functions of ``tinymim segment``."""

# ruff: noqa: PT028  (test_segmentor is not a pytest function)

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from tinymim import compat
from tinymim.engine.run_folder import RunFolder, on_first_process
from tinymim.errors import CheckpointError, ConfigError, DataError
from tinymim.files import prepare_out, sha256_file
from tinymim.progress import Progress
from tinymim.seg.config import find_config, merge_options, name_run, say, set_data, set_device
from tinymim.seg.loop import stop_loader
from tinymim.seg.metric import SegMetric, SegResult
from tinymim.seg.segmentor import load_segmentor


def train_segmentor(
    config: str | Path | Config,
    *,
    work_dir: str | Path,
    data_root: str | Path | None = None,
    student: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    amp: bool = False,
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
        resume: Continue exactly from the last checkpoint in ``work_dir``.
        overwrite: Empty ``work_dir`` first.
        amp: Mixed precision: bfloat16 on CPUs and on GPUs that have it, else float16.
        device: "cpu", "cuda", "cuda:N"; default: a GPU if there is one.
        cfg_options: Overrides of the config, ``{"optim_wrapper.optimizer.lr": 1e-3}``.
        ignore_label: Id or ids to ignore, for folders without ``dataset.json``.
        reduce_zero_label: Whether id 0 is "no class", for folders without ``dataset.json``.

    Returns:
        Scores of the trained model, with the paths of its files (``.segmentor``, ``.metrics``, ``.work_dir``).

    Raises:
        TinyMIMError: anything the user can fix (data, options, weights, a full disk).
        CheckFailed: the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    cfg = find_config(config)
    merge_options(cfg, cfg_options)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label)
    if student is not None:
        if not Path(student).is_file():
            raise CheckpointError(f"no checkpoint at {student}", "the file does not exist", "check --student")
        cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(student))
    kind = set_device(cfg, device, amp)
    folder = Path(work_dir)
    _open_folder(cfg, folder, resume=resume, overwrite=overwrite)
    say(f"data: {layout}")
    batch, world = cfg.train_dataloader.batch_size, compat.launched_processes()
    say(f"{kind}: {world} process(es) x batch {batch} = {world * batch} photos per step -> {folder}")
    with _our_errors():
        runner = Runner.from_cfg(name_run(cfg))
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
        checkpoint: ``segmentor.pth`` or ``iter_N.pth``.
        data_root: Labelled folder; default: the config's.
        tta: Average over sizes and mirror images (the config's ``tta_pipeline``).
        device: As in :func:`train_segmentor`.
        cfg_options: Overrides of the config.
        ignore_label: As in :func:`train_segmentor`.
        reduce_zero_label: As in :func:`train_segmentor`.

    Raises:
        TinyMIMError: anything the user can fix.
    """
    model, cfg = load_segmentor(checkpoint, config)
    trained = model.num_classes
    merge_options(cfg, cfg_options)
    layout = set_data(cfg, data_root, ignore_label, reduce_zero_label, splits=("val",))
    if len(layout.classes) != trained:
        raise DataError(
            f"{checkpoint} has {trained} classes, {layout.root} has {len(layout.classes)}",
            "the segmentor was trained on other data",
            "give the folder it was trained for, or one whose dataset.json lists the same classes",
        )
    kind = set_device(cfg, device, amp=False)
    if compat.launched_processes() > 1 and kind == "cuda":
        from mmengine.dist import init_dist, is_distributed

        if not is_distributed():
            init_dist("pytorch")
    say(f"data: {layout}")
    init_default_scope("mmseg")
    loader_cfg = cfg.val_dataloader
    if tta:
        from mmseg.models import SegTTAModel

        loader_cfg.dataset.pipeline = cfg.tta_pipeline
        model = SegTTAModel(module=model)
    model = model.to(kind).eval()
    metric = SegMetric()
    with _our_errors():
        loader = Runner.build_dataloader(loader_cfg, seed=0)
        metric.dataset_meta = loader.dataset.metainfo
        progress = Progress("test", len(loader)) if is_main_process() else None
        for i, batch in enumerate(loader):
            with torch.no_grad():
                samples = model.test_step(batch)  # type: ignore[operator]
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


def _open_folder(cfg: Config, work_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Create or reopen the run folder, once for all processes; set the checkpoint that ``cfg`` resumes from."""
    if compat.launched_processes() > 1 and not torch.distributed.is_initialized():
        from mmengine.dist import init_dist

        init_dist("pytorch")

    def open_it() -> str | None:
        prepare_out(work_dir, resume=resume, overwrite=overwrite, option="--work-dir")
        return _last_checkpoint(cfg, work_dir) if resume else None

    checkpoint = on_first_process(open_it)
    cfg.work_dir, cfg.resume, cfg.load_from = str(work_dir), checkpoint is not None, checkpoint
    if cfg.resume:
        cfg.model.backbone.init_cfg = None  # every weight comes from the checkpoint


def _last_checkpoint(cfg: Config, work_dir: Path) -> str | None:
    """Path of the newest checkpoint of a run; None if it was stopped before the first.

    Raises:
        ConfigError: the run was made with another model.
    """
    if (work_dir / "config.py").is_file():
        before = Config.fromfile(str(work_dir / "config.py"))
        differ = [
            key
            for key in sorted({*before.model, *cfg.model})
            if _plain(before.model.get(key)) != _plain(cfg.model.get(key))
        ]
        if differ:
            raise ConfigError(
                f"{work_dir} was trained with another model ({', '.join(f'model.{key}' for key in differ)} differ)",
                "a run can only be resumed with the options it was started with",
                "repeat the first command with --resume, or start a new run with another --work-dir",
            )
    newest = RunFolder(work_dir, "iter").newest()
    return str(newest) if newest else None


def _plain(value: Any) -> Any:
    """A config node as plain values, without what may change on resume (initial weights, SyncBN or BN)."""
    if isinstance(value, dict):
        return {k: "BN" if v == "SyncBN" else _plain(v) for k, v in value.items() if k != "init_cfg"}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


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
