"""The training loop and its hooks: one step is one global batch; everything random follows from (seed, step, process).

Nothing random is carried from step to step, so a killed run continues bit-identically from its last checkpoint.
"""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from tinymim.engine.model import NonFiniteLoss, Trainable
from tinymim.engine.recipe import learning_rate
from tinymim.files import atomic_path
from tinymim.models.checkpoints import save_torch
from tinymim.progress import Progress


def bare(runner: Any) -> Trainable:
    """The model without its DDP wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def stop_workers(batches: Any) -> None:
    """End the data workers of a loader's iterator: they ignore SIGTERM; after an error Python would wait."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


@LOOPS.register_module()
class StepLoop(BaseLoop):
    """Optimizer steps: draw a batch, split it into micro-batches, accumulate, update.

    Args:
        runner: MMEngine's Runner.
        dataloader: Yields this process's share of each global batch, from step ``start`` on.
        max_iters: Steps in all.
        start: First step (resume).
        micro_batch: Images a forward pass; divides this process's share.
        seed: Fixes drop path and masks.
    """

    def __init__(
        self, runner: Any, dataloader: Any, max_iters: int, start: int = 0, micro_batch: int = 1, seed: int = 0
    ) -> None:
        super().__init__(runner, dataloader)
        self._iter, self._max_iters, self.micro_batch, self.seed = start, max_iters, micro_batch, seed
        self.waited, self.stop = 0.0, False

    @property
    def iter(self) -> int:
        """Steps done."""
        return self._iter

    @property
    def epoch(self) -> int:
        """MMEngine asks; one long epoch."""
        return 0

    @property
    def max_iters(self) -> int:
        """Steps in all."""
        return self._max_iters

    @property
    def max_epochs(self) -> int:
        """MMEngine asks; one long epoch."""
        return 1

    def run(self) -> Any:
        """Train to the end, or to the first interrupt: then save and raise KeyboardInterrupt."""
        runner = self.runner
        sampler: Any = self.dataloader.batch_sampler
        share = sampler.batch_size // get_world_size()
        parts = share // self.micro_batch
        runner.optim_wrapper.initialize_count_status(runner.model, self._iter * parts, self._max_iters * parts)
        previous = (
            {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
            if (threading.current_thread() is threading.main_thread())
            else {}
        )
        batches: Any = None
        try:
            runner.call_hook("before_train")
            runner.model.train()
            batches = iter(self.dataloader)
            while self._iter < self._max_iters:
                began = time.monotonic()
                batch = next(batches)
                self.waited = time.monotonic() - began
                self.run_iter(batch)
                if self.stop and self._iter < self._max_iters:
                    next(hook for hook in runner.hooks if isinstance(hook, SaveHook)).save(runner)
                    raise KeyboardInterrupt
            runner.call_hook("after_train")
        finally:
            stop_workers(batches)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return runner.model

    def run_iter(self, batch: dict[str, Any]) -> None:
        """One optimizer step."""
        runner = self.runner
        torch.manual_seed((self.seed * 1_000_003 + self._iter) * get_world_size() + get_rank())
        skipped = batch.pop("skipped")
        runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batch)
        count = len(batch["image"])
        total: dict[str, Tensor] = {}
        for first in range(0, count, self.micro_batch):
            micro = {key: value[first : first + self.micro_batch] for key, value in batch.items()}
            losses = runner.model.train_step(micro, optim_wrapper=runner.optim_wrapper)
            for key, value in losses.items():
                total[key] = total.get(key, torch.zeros_like(value)) + value * (len(micro["image"]) / count)
        self._iter += 1
        runner.call_hook(
            "after_train_iter", batch_idx=self._iter - 1, data_batch={"skipped": skipped, "count": count}, outputs=total
        )

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True


@HOOKS.register_module()
class ScheduleHook(Hook):
    """Learning rate as a pure function of the step."""

    def __init__(self, steps: int, warmup: int, peak: float, final: float) -> None:
        self.numbers = dict(steps=steps, warmup=warmup, peak=peak, final=final)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        rate = learning_rate(batch_idx, **self.numbers)  # type: ignore[arg-type]
        for group in runner.optim_wrapper.param_groups:
            group["lr"] = rate


@HOOKS.register_module()
class MonitorHook(Hook):
    """metrics.jsonl, the live line, held-out losses, damaged photos, and the dump of a batch with a bad loss.

    Args:
        out: Run folder.
        title: Start of the live line.
        log_every: Steps between lines of metrics.jsonl.
        val_loader: Held-out photos, or None.
        val_every: Steps between held-out losses.
    """

    def __init__(
        self, out: Path, title: str, log_every: int, val_loader: DataLoader | None = None, val_every: int = 0
    ) -> None:
        self.out, self.title, self.log_every = out, title, log_every
        self.val_loader, self.val_every = val_loader, val_every
        self.skipped: dict[str, int] = {}
        self.val: list[tuple[int, float]] = []
        self.last: dict[str, float] = {}
        self.last_val: dict[str, float] = {}
        self.val_photos = 0
        self.val_damaged: list[str] = []

    def before_train(self, runner: Any) -> None:
        self.line = Progress(self.title, runner.max_iters, start=runner.iter)
        self._keep_lines_until(runner.iter)
        if runner.iter == 0:
            self._validate(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step = runner.iter
        if step % self.log_every == 0 or step == runner.max_iters:
            values = torch.stack([value.float() for value in outputs.values()])
            all_reduce(values, "mean")  # over processes: the loss of the global batch
            self.last = dict(zip(outputs, values.tolist(), strict=True))
            groups = runner.optim_wrapper.optimizer.param_groups  # the wrapper's own list has one more, never stepped
            self._write({"step": step, **self.last, "lr": max(group["lr"] for group in groups)})
        for path in data_batch["skipped"]:
            self.skipped[path] = self.skipped.get(path, 0) + 1
            if self.skipped[path] == 1:
                print(f"\nwarning: skipped damaged photo {path} (another took its place)")
        if is_main_process():
            count = data_batch["count"] * get_world_size()
            self.line.update(step, images=count, waited=runner.train_loop.waited, **self.last)
        if self.val_every and (step % self.val_every == 0 or step == runner.max_iters):
            self._validate(runner)

    def after_train(self, runner: Any) -> None:
        if is_main_process():
            losses = "  ".join(f"{k} {v:.4g}" for k, v in self.last.items())
            self.line.close(f"{runner.max_iters} steps  {losses}")
            if self.skipped:
                print(
                    f"warning: {len(self.skipped)} damaged photo(s) skipped, {sum(self.skipped.values())} times in all"
                )
            if self.val_damaged:
                print(f"warning: {len(self.val_damaged)} damaged photo(s) left out of the score, {self.val_damaged[0]}")

    @torch.no_grad()
    def _validate(self, runner: Any) -> None:
        """Mean held-out losses under fixed masks, over what each process was given; the first one writes."""
        if self.val_loader is None:
            return
        model = bare(runner)
        model.eval()
        sums: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batches = iter(self.val_loader)
            try:
                for batch in batches:
                    self.val_damaged += [path for path in batch.pop("skipped") if path not in self.val_damaged]
                    if not batch:
                        continue
                    views = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
                    n = len(views["image"])
                    for key, value in (model(**views) | {"count": torch.ones(())}).items():
                        sums[key] = sums.get(key, 0.0) + value.detach().double().cpu() * n
            finally:
                stop_workers(batches)
        runner.model.train()
        totals = torch.stack([*sums.values()]).to(next(model.parameters()).device)
        all_reduce(totals)
        *values, count = totals.tolist()
        self.val_photos = round(count)
        means = {f"val_{key}": value / count for key, value in zip(sums, values, strict=False)}
        self.last_val = means
        self.val.append((runner.iter, means["val_loss"]))
        self._write({"step": runner.iter, **means})

    def _write(self, record: dict[str, float]) -> None:
        if not is_main_process():
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def _keep_lines_until(self, step: int) -> None:
        """On resume, drop what a killed run wrote after its last checkpoint."""
        path = self.out / "metrics.jsonl"
        if not is_main_process() or not path.is_file():
            return
        kept = []
        for text in path.read_text().splitlines():
            try:
                record = json.loads(text)
            except ValueError:
                continue  # the line the kill cut short
            if record["step"] <= step and step > 0:
                kept.append(text)
                if "val_loss" in record:
                    self.val.append((record["step"], record["val_loss"]))
                    self.last_val = {name: value for name, value in record.items() if name.startswith("val_")}
        with atomic_path(path) as part:
            part.write_text("".join(f"{text}\n" for text in kept))


@HOOKS.register_module()
class SaveHook(Hook):
    """Checkpoints (two newest kept) and a clean student file, each written aside and renamed.

    Args:
        out: Run folder.
        every: Steps between saves.
        save_student: Called with the encoder and the steps done; writes student.pth.
        state: Restored optimizer and scaler state, or None.
        micro_batch: Kept for the resumed run.
    """

    def __init__(
        self, out: Path, every: int, save_student: Any, state: dict[str, Any] | None, micro_batch: int
    ) -> None:
        self.out, self.every, self.save_student = out, every, save_student
        self.state, self.micro_batch = state, micro_batch

    def before_train(self, runner: Any) -> None:
        self.began = time.monotonic() - (self.state or {}).get("seconds", 0.0)
        if self.state is not None:
            runner.optim_wrapper.load_state_dict(self.state["optimizer"])

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter % self.every == 0 or runner.iter == runner.max_iters:
            self.save(runner)

    def save(self, runner: Any) -> None:
        """Write step_N.pth and student.pth; processes other than the first do nothing."""
        if not is_main_process():
            return
        model = bare(runner)
        folder = self.out / "checkpoints"
        save_torch(
            {
                "step": runner.iter,
                "seconds": time.monotonic() - self.began,
                "micro_batch": self.micro_batch,
                "model": model.learned.state_dict(),
                "optimizer": runner.optim_wrapper.state_dict(),
            },
            folder / f"step_{runner.iter:08d}.pth",
        )
        for old in sorted(folder.glob("step_*.pth"))[:-2]:
            old.unlink()
        self.save_student(model.encoder, runner.iter)


def dump_bad_batch(out: Path, runner: Any) -> Path:
    """Write the batch behind a NonFiniteLoss, as uint8 tensors, for a person to look at."""
    path = out / "bad_batch.pth"
    save_torch({"step": runner.iter, "batch": {k: v.cpu() for k, v in bare(runner).last_batch.items()}}, path)
    return path


__all__ = ["MonitorHook", "NonFiniteLoss", "SaveHook", "ScheduleHook", "StepLoop", "bare", "dump_bad_batch"]
