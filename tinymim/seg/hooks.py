"""The run folder: config.py, env.json, metrics.jsonl, checkpoints/, segmentor.pth; and the progress line."""

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, all_reduce_params, barrier, get_world_size, is_distributed, is_main_process
from mmengine.hooks import Hook, LoggerHook, RuntimeInfoHook
from mmengine.runner.base_loop import BaseLoop
from mmengine.utils import apply_to
from mmseg.registry import HOOKS

from tinymim.engine.parallel import whole
from tinymim.engine.run_folder import RunFolder, bare, is_product, on_first_process
from tinymim.errors import ConfigError, TinyMIMError
from tinymim.files import (
    atomic_path,
    describe_file,
    describe_files,
    drop_output,
    noted_output,
    versions,
    write_env,
    write_text,
)
from tinymim.models import Backbone
from tinymim.models.checkpoints import save_torch
from tinymim.models.weight_files import weights_file
from tinymim.progress import Progress
from tinymim.records import read_env
from tinymim.seg.config import config_text, say
from tinymim.seg.resume import check_data

BEST = "best_segmentor.pth"


@HOOKS.register_module()
class RunFolderHook(Hook):
    """Writes the files of a run; replaces MMEngine's checkpoint and logger hooks.

    ``checkpoints/iter_N.pth`` has MMEngine's format and can be resumed; ``segmentor.pth`` holds the weights and the
    metadata for using them, no optimizer, and loads with ``weights_only=True``. Where an earlier validation than the
    last one was the best, ``best_segmentor.pth`` holds the weights of that step. Every file is complete or absent.

    Args:
        interval: Steps between checkpoints; the last step always gets one.
        keep: Number of checkpoints to keep.
        log_interval: Steps between lines in metrics.jsonl.
        patience: Stop after so many validations in a row without a better mIoU; None: never.
    """

    priority = "VERY_LOW"

    def __init__(
        self, interval: int = 1000, keep: int = 2, log_interval: int = 10, patience: int | None = None
    ) -> None:
        self.interval, self.keep, self.log_interval, self.patience = interval, keep, log_interval, patience
        self.scores: dict[str, float] = {}
        self.history: list[tuple[int, float]] = []  # (step, mIoU) of every validation
        self.saved, self.rate = -1, 0.0
        self.whole: dict[str, Any] = {}
        self.progress: Progress | None = None

    def before_run(self, runner: Any) -> None:
        """Before training: check that the heads have as many classes as the data, and a resumed run the same data."""
        if not _is_training(runner):
            return
        data, source, taught = runner.train_dataloader.dataset, _student(runner.cfg), runner.cfg.get("teacher")
        _check_classes(bare(runner.model), data.metainfo["classes"])
        if taught and not hasattr(runner, "begin"):  # MMEngine's own
            raise ConfigError(
                "the config has a teacher",
                "tinymim segment lets it teach; MMSegmentation's own tools do not",
                "use tinymim segment, or take `teacher` out of the config",
            )

        def describe() -> dict[str, Any]:
            pairs = [path for pair in data.pairs for path in pair] if hasattr(data, "layout") else None
            found = {
                "student": describe_file(weights_file(source)) if source else None,
                **({"teacher": describe_file(weights_file(taught.checkpoint))} if taught else {}),
                "data": describe_files(data.layout.root, pairs) if pairs is not None else None,
                "config_sha256": hashlib.sha256(_plain_text(runner.cfg).encode()).hexdigest(),
                "processes": get_world_size(),
            }
            if (pseudo := getattr(data, "pseudo", None)) is not None:
                paths = [path for pair in pseudo.train for path in pair]
                found["pseudo"] = describe_files(pseudo.root, paths) | {"weight": data.weight}
            opened = getattr(runner, "opened", None)
            if opened is not None and not opened.fresh:
                check_data(read_env(runner.work_dir).get("inputs") or {}, found)
            return found

        self.inputs = on_first_process(describe)

    def before_train(self, runner: Any) -> None:
        """Begin: config.py, env.json; drop metrics that a killed run wrote after its last checkpoint."""
        folder = self._folder(runner)

        def begin() -> None:
            if hasattr(runner, "begin"):  # ours; MMEngine's has written its config before
                runner.begin()
            write_env(runner.work_dir, self.inputs)

        on_first_process(begin)
        if not any(isinstance(hook, LoggerHook) for hook in runner.hooks):
            for hook in runner.hooks:
                if isinstance(hook, RuntimeInfoHook):  # it would wait for the GPU to keep losses that nobody reads
                    setattr(hook, "after_train_iter", Hook.after_train_iter.__get__(hook))  # noqa: B010
        done = on_first_process(lambda: [line for line in folder.log_until(runner.iter) if "mIoU" in line])
        runner.train_loop.validated = {line["step"] for line in done}
        self.scores = done[-1] if done else {}
        self.history = [(line["step"], line["mIoU"]) for line in done]
        best, step = Path(runner.work_dir) / BEST, self._best()[0] if self.history else 0
        if is_main_process() and best.is_file() and not is_product(best, step=step):
            drop_output(best.parent, best.name)  # of a step that is trained again
        self._stop_if_stale(runner)
        if is_main_process():
            self.progress = Progress("train", runner.max_iters, start=runner.iter)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Store the largest learning rate of the step."""
        self.rate = max(group["lr"] for group in runner.optim_wrapper.optimizer.param_groups)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Progress line, metrics line, checkpoint."""
        step, loop = batch_idx + 1, runner.train_loop
        last = step == runner.max_iters
        if step % self.log_interval == 0 or last:
            skipped = {"skipped_photos": len(loop.skipped)} if loop.skipped else {}
            self._folder(runner).log({"step": step, **of_all(loop.read_losses()), "lr": self.rate, **skipped})
        if self.progress is not None:
            shown = {"loss": loop.losses["loss"]} if loop.losses else {}
            self.progress.update(step, images=len(data_batch["inputs"]), waited=loop.waited, **shown)
        if step % self.interval == 0 or last:
            self.save_now(runner, step)

    def before_val_epoch(self, runner: Any) -> None:
        """Average the buffers, so that all processes validate the same model; end the progress line."""
        average_buffers(runner.model)
        if self.progress is not None:
            self.progress.pause()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the scores to metrics.jsonl, and into a segmentor.pth of this step."""
        if not _is_training(runner):
            return
        self.scores = {"step": runner.iter, **(metrics or {})}
        repeated = runner.iter in runner.train_loop.validated
        runner.train_loop.validated.add(runner.iter)
        if not repeated:
            self._folder(runner).log(self.scores)
            if "mIoU" in self.scores:
                self.history.append((runner.iter, self.scores["mIoU"]))
                self._keep_best(runner)
        # a run that is resumed after its last step may lack what should have followed from it
        if self.saved != runner.iter and runner.iter != runner.max_iters:
            return
        state, product = whole(bare(runner.model).state_dict()), Path(runner.work_dir) / "segmentor.pth"
        if is_main_process() and not is_product(product, step=runner.iter, metrics=_plain(self.scores)):
            write_segmentor(runner, state, self.scores, runner.iter)

    def _best(self) -> tuple[int, float]:
        """Step and mIoU of the best validation, the first of equal ones."""
        return max(self.history, key=lambda each: (each[1], -each[0]))

    def _stop_if_stale(self, runner: Any) -> bool:
        """Whether the run ends here, for want of a better validation."""
        if self.patience is None or not self.history or runner.iter >= runner.max_iters:
            return False
        step, miou = self._best()
        stale = sum(at > step for at, _ in self.history)
        if stale >= self.patience:
            say(f"stopping: no better mIoU than {100 * miou:.2f} % of step {step} in {stale} validations (--patience)")
            runner.train_loop.stop_training = True
        return stale >= self.patience

    def _keep_best(self, runner: Any) -> None:
        """After a validation: while the best one is not of the last step, its weights stay in a file of their own."""
        step, product = self._best()[0], Path(runner.work_dir) / BEST
        last = self._stop_if_stale(runner) or runner.iter == runner.max_iters
        if step == runner.iter and last:
            on_first_process(lambda: drop_output(product.parent, product.name))
        elif step == runner.iter:
            state = whole(bare(runner.model).state_dict())
            if is_main_process():
                write_segmentor(runner, state, self.scores, step, product.name)
        if last and self.saved != runner.iter:
            self.save_now(runner, runner.iter)

    def after_train(self, runner: Any) -> None:
        """Close the progress line."""
        if self.progress is not None:
            self.progress.close(f"{runner.iter} steps, {Path(runner.work_dir) / 'segmentor.pth'}")
            if runner.train_loop.skipped:
                say(runner.train_loop.skipped.summary())

    def save_now(self, runner: Any, step: int) -> None:
        """Write segmentor and checkpoint after ``step`` steps, atomically; remove old checkpoints.

        Raises:
            CheckFailed: the loss of the last step is not finite.
            TinyMIMError: the disk is full or the folder cannot be written.
        """
        runner.train_loop.read_losses()
        average_buffers(runner.model)
        state, optimizer = whole(bare(runner.model).state_dict()), whole(runner.optim_wrapper.state_dict())
        self.whole = {"state_dict": state, "optimizer": optimizer}
        if is_main_process():
            folder = self._folder(runner)
            folder.check_here()
            path = folder.checkpoint(step)
            try:
                with atomic_path(path) as part:
                    meta = {"iter": step, "epoch": 0}
                    runner.save_checkpoint(str(part.parent), part.name, meta=meta, by_epoch=False)
                    # before the checkpoint has its name, which says done
                    write_segmentor(runner, state, self.scores, step)
            except RuntimeError as error:  # how torch reports a full disk
                raise TinyMIMError(
                    f"cannot write {path}",
                    f"{error} (no partial file is left, older checkpoints are kept)",
                    "free some space, then continue with --resume",
                ) from error
            write_text(Path(runner.work_dir) / "last_checkpoint", str(path))
            folder.rotate(path)
        self.saved, self.whole = step, {}
        barrier()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Whole weights and moments in place of sharded ones, for which all processes are needed."""
        checkpoint |= apply_to(self.whole, lambda value: hasattr(value, "cpu"), lambda value: value.cpu())

    def _folder(self, runner: Any) -> RunFolder:
        return RunFolder(Path(runner.work_dir), "iter", self.keep)


def of_all(losses: dict[str, float]) -> dict[str, float]:
    """The mean over all processes; all of them must call it."""
    values = torch.tensor([*losses.values()], dtype=torch.float64)
    all_reduce(values, "mean")
    return dict(zip(losses, values.tolist(), strict=True))


def average_buffers(model: Any) -> None:
    """Average the batch-norm statistics over all processes (plain BN has its own in each)."""
    if is_distributed():
        all_reduce_params([b for b in model.buffers() if b.is_floating_point()], op="mean")


def _is_training(runner: Any) -> bool:
    return isinstance(runner._train_loop, BaseLoop)  # a dict if only validation or a test runs


def _check_classes(model: Any, classes: list[str]) -> None:
    """Refuse heads with another number of classes than the data."""
    heads: dict[str, Any] = {name: getattr(model, name, None) for name in ("decode_head", "auxiliary_head")}
    wrong = {
        name: head.num_classes
        for name, head in heads.items()
        if hasattr(head, "num_classes") and head.num_classes != len(classes)
    }
    if wrong:
        raise ConfigError(
            f"the data have {len(classes)} classes, the config's heads have {next(iter(wrong.values()))}",
            "tinymim segment sets the heads to the data's classes; MMSegmentation's own tools do not",
            "add --cfg-options " + " ".join(f"model.{name}.num_classes={len(classes)}" for name in wrong),
        )


def _student(cfg: Any) -> str | None:
    """The file of the backbone's initial weights, or None."""
    source = (cfg.model.backbone.get("init_cfg") or {}).get("checkpoint")
    return source if source and os.path.isfile(source) else None


def _plain_text(cfg: Any) -> str:
    """The config as segmentor.pth stores it, without paths of weights."""
    plain = copy.deepcopy(cfg)
    plain.model.backbone.init_cfg = None
    if plain.model.get("init_cfg"):
        plain.model.init_cfg = None
    plain.load_from, plain.resume = None, False
    if plain.get("teacher"):
        plain.teacher.checkpoint = None
    return config_text(plain)


def _plain(scores: dict[str, float]) -> dict[str, float]:
    """Scores as ``segmentor.pth`` stores them."""
    return {name: float(value) for name, value in scores.items()}


def write_segmentor(
    runner: Any, state: dict[str, Any], scores: dict[str, float], step: int, name: str = "segmentor.pth"
) -> None:
    """Write segmentor.pth: ``{"state_dict", "meta"}``, tensors and plain values only; ``state`` is the whole one."""
    model, cfg, folder = bare(runner.model), runner.cfg, Path(runner.work_dir)
    inputs = read_env(folder).get("inputs", {})  # a resumed run does not name the student again
    pre, data = cfg.model.data_preprocessor, runner.train_dataloader.dataset.metainfo
    meta = {
        "config": _plain_text(cfg),
        "backbone": dict(model.backbone.config) if isinstance(model.backbone, Backbone) else None,
        "classes": list(data["classes"]),
        "palette": [list(map(int, colour)) for colour in data["palette"]],
        "mean": pre.get("mean") and list(map(float, pre["mean"])),  # None: not normalised
        "std": pre.get("std") and list(map(float, pre["std"])),
        "student_sha256": (inputs.get("student") or {}).get("sha256"),
        **({"teacher_sha256": inputs["teacher"]["sha256"]} if inputs.get("teacher") else {}),
        "versions": versions(),
        "metrics": _plain(scores),
        "step": step,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with noted_output(folder, name):
        save_torch({"state_dict": state, "meta": meta}, folder / name)
