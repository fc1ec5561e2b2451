"""The training loop: one step is one global batch; (seed, step, place in the batch) fixes all random numbers.

No random state is carried from step to step, so a killed run continues bit-identically from its last checkpoint.
"""

import time
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop
from torch import Tensor

from tinymim.engine.parallel import Vote
from tinymim.engine.run_folder import bare, save_and_stop, stop_signals, stop_workers
from tinymim.models.draws import rows_of


@LOOPS.register_module()
class StepLoop(BaseLoop):
    """Optimizer steps: draw a batch, split it into micro-batches, accumulate, update.

    Args:
        runner: MMEngine's Runner.
        dataloader: Yields this process's share of each global batch, from step ``start`` on.
        max_iters: Steps in all.
        start: First step (resume).
        micro_batch: Images per forward pass; divides this process's share.
        seed: Fixes drop path and masks.
        by_rows: Whether they follow the place in the global batch (:mod:`tinymim.models.draws`); False for runs that
            began before: there they follow process and pass.

    Attributes:
        waited: Seconds the current step waited for data.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        start: int = 0,
        micro_batch: int = 1,
        seed: int = 0,
        by_rows: bool = True,
    ) -> None:
        super().__init__(runner, dataloader)
        self._iter, self._max_iters, self.micro_batch, self.seed = start, max_iters, micro_batch, seed
        self.by_rows, self.waited = by_rows, 0.0

    @property
    def iter(self) -> int:
        """Steps done."""
        return self._iter

    @property
    def epoch(self) -> int:
        """Required by MMEngine; the run is one long epoch."""
        return 0

    @property
    def max_iters(self) -> int:
        """Steps in all."""
        return self._max_iters

    @property
    def max_epochs(self) -> int:
        """Required by MMEngine; the run is one long epoch."""
        return 1

    def run(self) -> Any:
        """Train to the end, or to the first interrupt: then save and raise KeyboardInterrupt."""
        runner = self.runner
        sampler: Any = self.dataloader.batch_sampler
        share = sampler.batch_size // get_world_size()
        parts = share // self.micro_batch
        runner.optim_wrapper.initialize_count_status(runner.model, self._iter * parts, self._max_iters * parts)
        batches: Any = None
        vote = Vote()
        with stop_signals() as stop:
            try:
                runner.call_hook("before_train")
                runner.model.train()
                batches = iter(self.dataloader)
                while self._iter < self._max_iters:
                    began = time.monotonic()
                    batch = next(batches)
                    self.waited = time.monotonic() - began
                    self.run_iter(batch)
                    if vote.any(bool(stop)) and self._iter < self._max_iters:
                        save_and_stop(runner, self._iter)
                runner.call_hook("after_train")
            finally:
                stop_workers(batches)
        return runner.model

    def run_iter(self, batch: dict[str, Any]) -> None:
        """One optimizer step."""
        runner = self.runner
        world, rank = get_world_size(), get_rank()
        seed = self.seed * 1_000_003 + self._iter
        torch.manual_seed(seed if self.by_rows else seed * world + rank)
        skipped = batch.pop("skipped")
        runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batch)
        count = len(batch["image"])
        total: dict[str, Tensor] = {}
        for first in range(0, count, self.micro_batch):
            micro = {key: value[first : first + self.micro_batch] for key, value in batch.items()}
            size = len(micro["image"])
            if self.by_rows:
                torch.manual_seed(seed)
            with rows_of(rank * count + first, size, world * count if self.by_rows else size):
                losses = runner.model.train_step(micro, optim_wrapper=runner.optim_wrapper)
            for key, value in losses.items():
                total[key] = total.get(key, torch.zeros_like(value)) + value * (size / count)
        bare(runner.model).check_finite()
        self._iter += 1
        runner.call_hook(
            "after_train_iter", batch_idx=self._iter - 1, data_batch={"skipped": skipped, "count": count}, outputs=total
        )
