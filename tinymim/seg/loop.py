"""The training loop: resumes without reading seen batches, stops cleanly on Ctrl-C and on a loss that is not finite."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, is_distributed
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from mmseg.registry import LOOPS

from tinymim.engine.loop import stop_workers
from tinymim.errors import CheckFailed, ConfigError
from tinymim.models.checkpoints import save_torch
from tinymim.seg.dataset import mix_seed


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop`` with exact resume.

    Random numbers of iteration i (drop path, dropout) depend on (seed, i, process) only, those of a sample on its
    position; the sampler starts where the run stopped. Validation also follows the last iteration.

    Attributes:
        validated: Steps whose validation is in metrics.jsonl (filled by RunFolderHook).
        waited: Seconds the current iteration waited for data.
        skipped: Damaged photos passed over so far.
    """

    def __init__(
        self, runner: Any, dataloader: Any, max_iters: int, val_begin: int = 1, val_interval: int = 1000
    ) -> None:
        BaseLoop.__init__(self, runner, dataloader)  # not IterBasedTrainLoop's: it starts the workers already
        self._max_iters, self._max_epochs, self._epoch, self._iter = int(max_iters), 1, 0, 0
        self.val_begin, self.val_interval = val_begin, val_interval
        self.stop_training = False
        self.waited, self.skipped, self.interrupted = 0.0, set[str](), False
        self.validated: set[int] = set()
        runner.visualizer.dataset_meta = getattr(self.dataloader.dataset, "metainfo", None)
        if not hasattr(self.dataloader.sampler, "skip"):
            raise ConfigError(
                f"the sampler {type(self.dataloader.sampler).__name__} cannot skip to a position",
                "ResumableTrainLoop resumes without reading seen batches",
                'use train_dataloader.sampler=dict(type="ResumableSampler")',
            )

    def run(self) -> torch.nn.Module:
        """Train to ``max_iters``, validating every ``val_interval``."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        self.dataloader.sampler.skip(self._iter * self.dataloader.batch_size)
        batches: Iterator[Any] = iter(())
        try:
            with self._catch_signals():
                if self._iter > 0:
                    self._validate()  # the run may have been stopped between a checkpoint and its validation
                if self._iter < self._max_iters:
                    batches = iter(self.dataloader)
                while self._iter < self._max_iters and not self.stop_training:
                    self._step(batches)
        finally:
            stop_loader(self.dataloader, batches)
            if isinstance(runner._val_loop, BaseLoop):
                stop_loader(runner._val_loop.dataloader)
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _step(self, batches: Iterator[Any]) -> None:
        """One iteration with its data, and what is due after it."""
        self.runner.model.train()
        began = time.monotonic()
        batch = self._next(batches)
        self.waited = time.monotonic() - began
        torch.manual_seed(mix_seed(self.runner.seed or 0, 2, self._iter, get_rank()))
        self.run_iter(batch)
        if self.interrupted:
            self._save_and_stop()
        self._validate()
        if self.interrupted and self._iter < self._max_iters:
            self._save_and_stop()

    def run_iter(self, data_batch: Any) -> None:
        """One iteration.

        Raises:
            CheckFailed: the loss is not finite; the batch is written beside the checkpoints.
        """
        self._note_skipped(data_batch)
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        if not math.isfinite(float(outputs["loss"].detach())):
            raise self._not_finite(data_batch, outputs)
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def _validate(self) -> None:
        due = self._iter >= self.val_begin and self._iter % self.val_interval == 0
        if self.runner.val_loop is None or not (due or self._iter == self._max_iters):
            return
        if self._iter not in self.validated:
            self.runner.val_loop.run()

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except RuntimeError:
            if self.interrupted:  # Ctrl-C reaches the workers too
                self._save_and_stop()
            raise

    def _note_skipped(self, batch: Any) -> None:
        for sample in batch["data_samples"]:
            for what in sample.metainfo.get("skipped", ()):
                if what not in self.skipped:
                    self.skipped.add(what)
                    print(f"warning: {what}; skipped ({len(self.skipped)} so far)", flush=True)

    def _not_finite(self, batch: Any, outputs: dict[str, Any]) -> CheckFailed:
        """Dump the batch; the weights in memory are already spoilt and are dropped with the process."""
        losses = {name: float(value.detach()) for name, value in outputs.items()}
        path = Path(self.runner.work_dir) / f"bad_batch_{self._iter + 1}_rank{get_rank()}.pth"
        content = {
            "step": self._iter + 1,
            "losses": losses,
            "inputs": [image.cpu() for image in batch["inputs"]],
            "labels": [sample.gt_sem_seg.data.cpu() for sample in batch["data_samples"]],
            "files": [sample.metainfo.get("img_path") for sample in batch["data_samples"]],
        }
        save_torch(content, path)
        return CheckFailed(
            f"the loss of step {self._iter + 1} is not finite ({losses})",
            f"a too high rate, fp16 or broken weights; the batch is in {path}, the last good checkpoint is kept",
            "continue with --resume and a lower rate (--cfg-options optim_wrapper.optimizer.lr=...) or without --amp",
        )

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM finishes the iteration and saves; a second one stops at once.

        Several processes would stop at different iterations: there a signal ends the run as usual, and --resume goes
        on from the last checkpoint.
        """
        if is_distributed() or threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

        main = os.getpid()

        def note(kind: int, frame: Any) -> None:
            if self.interrupted or os.getpid() != main:  # data workers inherit this handler
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

        for kind in old:
            signal.signal(kind, note)
        try:
            yield
        finally:
            for kind, handler in old.items():
                signal.signal(kind, handler)

    def _save_and_stop(self) -> None:
        for hook in self.runner.hooks:
            if hasattr(hook, "save_now"):
                hook.save_now(self.runner, self._iter)
        raise KeyboardInterrupt


def stop_loader(loader: Any, batches: Any = None) -> None:
    """End the data workers of a loader at once; left to the garbage collector each would take 5 seconds."""
    for iterator in (batches, getattr(loader, "_iterator", None)):
        stop_workers(iterator)
    loader._iterator = None


def bare_model(model: Any) -> Any:
    """The model inside MMEngine's DDP wrapper."""
    return model.module if is_model_wrapper(model) else model
