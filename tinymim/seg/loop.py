"""The training loop: resumes without reading earlier batches, stops cleanly on Ctrl-C or a non-finite loss."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, is_distributed
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from mmseg.registry import LOOPS

from tinymim.engine.parallel import Vote
from tinymim.engine.run_folder import (
    DamagedPhotos,
    StopRequest,
    dump_bad_batch,
    save_and_stop,
    stop_signals,
    stop_workers,
)
from tinymim.errors import CheckFailed, ConfigError
from tinymim.seg.dataset import mix_seed

READ_AT_ONCE = ("cpu",)  # devices with nothing to wait for


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop`` with exact resume.

    The first Ctrl-C or SIGTERM, to any process, finishes the iteration, saves and raises KeyboardInterrupt.

    Random numbers of iteration i (drop path, dropout) depend only on (seed, i, process), those of a sample on its
    position; the sampler starts where the run stopped. Validation also runs after the last iteration. The workers of
    both data loaders live as long as the run.

    On a GPU an iteration's losses are read when the next one has been queued, so that the GPU never waits for Python;
    before anything is logged, saved or validated they are read at once.

    Attributes:
        losses: Losses of the newest iteration that has been read, by name.
        validated: Steps whose validation is in metrics.jsonl (filled by RunFolderHook).
        waited: Seconds the current iteration waited for data.
        skipped: Damaged photos skipped so far.
        stop: Whether a signal has requested a stop.
    """

    def __init__(
        self, runner: Any, dataloader: Any, max_iters: int, val_begin: int = 1, val_interval: int = 1000
    ) -> None:
        BaseLoop.__init__(self, runner, dataloader)  # not IterBasedTrainLoop's, which would start the workers
        self._max_iters, self._max_epochs, self._epoch, self._iter = int(max_iters), 1, 0, 0
        self.val_begin, self.val_interval = val_begin, val_interval
        self.stop_training = False
        self.waited, self.skipped, self.stop = 0.0, DamagedPhotos(), StopRequest()
        self.losses: dict[str, float] = {}
        self.unread: tuple[int, Any, dict[str, Any]] | None = None
        self.validated: set[int] = set()
        runner.visualizer.dataset_meta = getattr(self.dataloader.dataset, "metainfo", None)
        if not hasattr(self.dataloader.sampler, "skip"):
            raise ConfigError(
                f"the sampler {type(self.dataloader.sampler).__name__} cannot skip to a position",
                "ResumableTrainLoop resumes without reading earlier batches",
                'use train_dataloader.sampler=dict(type="ResumableSampler")',
            )

    def run(self) -> torch.nn.Module:
        """Train to ``max_iters``, validating every ``val_interval``."""
        runner = self.runner
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        self.dataloader.sampler.skip(self._iter * self.dataloader.batch_size)
        batches: Iterator[Any] = iter(())
        self.vote = Vote()
        try:
            with stop_signals() as self.stop:
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
        """One iteration with its data, then validation and a requested stop."""
        self.runner.model.train()
        began = time.monotonic()
        batch = self._next(batches)
        self.waited = time.monotonic() - began
        torch.manual_seed(mix_seed(self.runner.seed or 0, 2, self._iter, get_rank()))
        self.run_iter(batch)
        if self.vote.any(bool(self.stop)):
            save_and_stop(self.runner, self._iter)
        if self._validate() and self.vote.any(bool(self.stop)) and self._iter < self._max_iters:
            save_and_stop(self.runner, self._iter)

    def run_iter(self, data_batch: Any) -> None:
        """One iteration.

        Raises:
            CheckFailed: the loss of this iteration, or of the one before, is not finite; its batch is written into the
                run folder.
        """
        for sample in data_batch["data_samples"]:
            self.skipped.note(sample.metainfo.get("skipped", ()))
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = self.runner.model.train_step(data_batch, optim_wrapper=self.runner.optim_wrapper)
        self.read_losses()
        self.unread = self._iter + 1, data_batch, {name: value.detach() for name, value in outputs.items()}
        if outputs["loss"].device.type in READ_AT_ONCE:
            self.read_losses()
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def read_losses(self) -> dict[str, float]:
        """Read the losses of the newest iteration, if that has not been done, and return them.

        Raises:
            CheckFailed: the loss is not finite; the batch is written into the run folder.
        """
        if self.unread is not None:
            (step, batch, values), self.unread = self.unread, None
            self.losses = {name: float(value) for name, value in values.items()}
            if not math.isfinite(self.losses["loss"]):
                raise self._not_finite(step, batch)
        return self.losses

    def _validate(self) -> bool:
        """Whether it was time to."""
        due = self._iter >= self.val_begin and self._iter % self.val_interval == 0
        if self.runner.val_loop is None or not (due or self._iter == self._max_iters):
            return False
        self.read_losses()
        if self._iter not in self.validated:
            self.runner.val_loop.run()
        return True

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except RuntimeError:
            if self.stop and not is_distributed():  # Ctrl-C also reached the workers
                save_and_stop(self.runner, self._iter)
            raise

    def _not_finite(self, step: int, batch: Any) -> CheckFailed:
        """Dump the batch; the weights in memory are already corrupt and are not saved."""
        samples = batch["data_samples"]
        path = dump_bad_batch(
            Path(self.runner.work_dir) / f"bad_batch_{step}_rank{get_rank()}.pth",
            step,
            losses=self.losses,
            inputs=list(batch["inputs"]),
            labels=[sample.gt_sem_seg.data for sample in samples],
            files=[sample.metainfo.get("img_path") for sample in samples],
        )
        return CheckFailed(
            f"the loss of step {step} is not finite ({self.losses})",
            "the learning rate is too high, fp16 overflows, or weights are broken; "
            f"the batch is in {path}, the last good checkpoint is kept",
            "continue with --resume and a lower rate (--cfg-options optim_wrapper.optimizer.lr=...) or without --amp",
        )


def stop_loader(loader: Any, batches: Any = None) -> None:
    """Stop the data workers of a loader at once; the garbage collector would take 5 seconds for each."""
    for iterator in (batches, getattr(loader, "_iterator", None)):
        stop_workers(iterator)
    loader._iterator = None
