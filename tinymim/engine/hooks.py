"""Hooks of the training loop: learning rate, metrics and progress line, checkpoints."""

import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import DataLoader

from tinymim.engine.parallel import gathered, shard_moments, whole, whole_encoder
from tinymim.engine.recipe import learning_rate
from tinymim.engine.run_folder import DamagedPhotos, RunFolder, bare, stop_workers
from tinymim.errors import DataError
from tinymim.models.checkpoints import save_torch
from tinymim.models.draws import rows_of
from tinymim.progress import Progress, say

FEW_STEPS, MUCH_WAITING = 20, 0.1  # a note is printed where more steps waited for a larger share of the time


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
class StatisticsHook(Hook):
    """After every step each process has the mean of all running statistics of batch norm.

    So all score, save and resume the same model, as they have the same weights. In training each still normalises by
    the photos of its own pass: several processes do not give the losses of one, as without batch norm.

    Args:
        learned: What is trained.
    """

    def __init__(self, learned: torch.nn.Module) -> None:
        norms = [part for part in learned.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        self.values = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if get_world_size() > 1 and self.values:
            flat = torch.cat(self.values)
            all_reduce(flat, "mean")
            for own, mean in zip(self.values, flat.split([len(value) for value in self.values]), strict=True):
                own.copy_(mean)


class Waits:
    """Shares of the time that steps waited for data; the first step, which starts the data workers, is not counted.

    Attributes:
        steps: Steps counted.
    """

    def __init__(self) -> None:
        self.steps, self.began, self.waited = -1, 0.0, 0.0
        self.marked, self.noted = 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count a step that has ended."""
        self.steps += 1
        if self.steps == 0:
            self.began = self.marked = time.monotonic()
        else:
            self.waited += seconds

    def share(self) -> float:
        """Of all steps."""
        return self.waited / max(time.monotonic() - self.began, 1e-9)

    def lately(self) -> float:
        """Of the steps since this was last asked."""
        now = time.monotonic()
        share = (self.waited - self.noted) / max(now - self.marked, 1e-9)
        self.marked, self.noted = now, self.waited
        return round(share, 4)


@HOOKS.register_module()
class MonitorHook(Hook):
    """metrics.jsonl, the progress line, validation losses, and damaged photos.

    Args:
        out: Run folder.
        title: Start of the progress line.
        log_every: Steps between lines of metrics.jsonl.
        val_loader: Validation photos, or None.
        val_every: Steps between validations.
        advice: What to type where the steps waited for data.

    Attributes:
        last: Losses of the last logged step.
        val: (step, ``val_loss``) of every validation.
        last_val: All values of the last validation, ``val_`` before their names.
        val_photos: Photos in the last validation.
        val_damaged: Damaged photos left out of it.
        skipped: Damaged training photos, and how often each was skipped.
    """

    def __init__(
        self,
        out: Path,
        title: str,
        log_every: int,
        val_loader: DataLoader | None = None,
        val_every: int = 0,
        advice: str = "",
    ) -> None:
        self.advice = advice
        self.folder, self.title, self.log_every = RunFolder(out), title, log_every
        self.val_loader, self.val_every = val_loader, val_every
        self.skipped = DamagedPhotos()
        self.val: list[tuple[int, float]] = []
        self.last: dict[str, float] = {}
        self.last_val: dict[str, float] = {}
        self.val_photos = 0
        self.val_damaged: list[str] = []

    def before_train(self, runner: Any) -> None:
        self.line = Progress(self.title, runner.max_iters, start=runner.iter)
        self.waits = Waits()
        for record in self.folder.log_until(runner.iter):
            if "val_loss" in record:
                self.val.append((record["step"], record["val_loss"]))
                self.last_val = {name: value for name, value in record.items() if name.startswith("val_")}
            if "lr" in record:
                self.last = {name: value for name, value in record.items() if name not in ("step", "lr", "data_wait")}
        if runner.iter in (0, runner.max_iters):  # the scores of a run that has ended are told again
            self._validate(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step = runner.iter
        self.waits.add(runner.train_loop.waited)
        if step % self.log_every == 0 or step == runner.max_iters:
            values = torch.stack([value.float() for value in outputs.values()])
            all_reduce(values, "mean")  # over processes: the loss of the global batch
            self.last = dict(zip(outputs, values.tolist(), strict=True))
            groups = runner.optim_wrapper.optimizer.param_groups  # the wrapper's own list has an extra, unused one
            rate = max(group["lr"] for group in groups)
            self.folder.log({"step": step, **self.last, "lr": rate, "data_wait": self.waits.lately()})
        self.skipped.note(data_batch["skipped"])
        if is_main_process():
            count = data_batch["count"] * get_world_size()
            self.line.update(step, images=count, waited=runner.train_loop.waited, **self.last)
        if self.val_every and (step % self.val_every == 0 or step == runner.max_iters):
            self._validate(runner)

    def after_train(self, runner: Any) -> None:
        for rank, others in enumerate(all_gather_object(dict(self.skipped))):
            for path, times in others.items() if rank != get_rank() else ():
                self.skipped[path] = self.skipped.get(path, 0) + times
        if is_main_process():
            losses = "  ".join(f"{k} {v:.4g}" for k, v in self.last.items())
            self.line.close(f"{runner.max_iters} steps  {losses}")
            if self.skipped:
                say(self.skipped.summary())
            if self.waits.steps >= FEW_STEPS and (share := self.waits.share()) > MUCH_WAITING:
                say(f"note: {100 * share:.0f} % of the time was waiting for photos; try {self.advice}")
            if self.val_damaged:
                say(f"warning: {len(self.val_damaged)} damaged photo(s) left out of the score, {self.val_damaged[0]}")

    def close(self) -> None:
        """Stop the data workers of the validation, which stay from one to the next."""
        stop_workers(getattr(self.val_loader, "_iterator", None))

    @torch.no_grad()
    def _validate(self, runner: Any) -> None:
        """Mean validation losses under fixed masks over the shares of all processes; the first one writes them."""
        if self.val_loader is None:
            return
        loader: Any = self.val_loader
        model, own = bare(runner.model).eval(), dict[str, float]()
        device, keys, read = next(model.parameters()).device, [*loader.sampler], 0
        with torch.random.fork_rng(devices=[]), gathered(runner.model):
            for batch in loader:
                first, read = keys[read][1], read + min(loader.batch_size, len(keys) - read)
                self.val_damaged += [path for path in batch.pop("skipped") if path not in self.val_damaged]
                if not batch:
                    continue
                views = {key: value.to(device) for key, value in batch.items()}
                n = len(views["image"])
                torch.manual_seed(0)
                with rows_of(first, n, len(loader.dataset)):
                    losses = model(**views)
                for key, value in (losses | {"": torch.ones(())}).items():
                    own[key] = own.get(key, 0.0) + float(value.double()) * n
        runner.model.train()
        found = all_gather_object((own, self.val_damaged))  # a share may be empty, or damaged
        totals = {key: sum(each.get(key, 0.0) for each, _ in found) for shares, _ in found for key in shares}
        self.val_damaged = list(dict.fromkeys(path for _, paths in found for path in paths))
        self.val_photos = count = round(totals.pop("", 0))
        if not count:
            raise DataError(
                "no held-out photo can be read", f"e.g. {self.val_damaged[0]} is damaged", "check --val-data"
            )
        means = {f"val_{key}": value / count for key, value in totals.items()}
        self.last_val = means
        if not self.val or self.val[-1][0] != runner.iter:
            self.val.append((runner.iter, means["val_loss"]))
            self.folder.log({"step": runner.iter, **means})


@HOOKS.register_module()
class SaveHook(Hook):
    """Writes a clean student file, then the checkpoint that says so (the two newest are kept), atomically.

    Args:
        out: Run folder.
        every: Steps between saves.
        save_student: Called with the encoder and the steps done; writes student.pth.
        state: Restored optimizer and scaler state, or None.
        kept: Stored for a resumed run.
    """

    def __init__(
        self, out: Path, every: int, save_student: Any, state: dict[str, Any] | None, kept: dict[str, Any]
    ) -> None:
        self.folder, self.every, self.save_student = RunFolder(out), every, save_student
        self.state, self.kept = state, kept

    def before_train(self, runner: Any) -> None:
        self.began = time.monotonic() - (self.state or {}).get("seconds", 0.0)
        if self.state is not None:
            wrapper = runner.optim_wrapper
            wrapper.load_state_dict(shard_moments(self.state["optimizer"], wrapper.optimizer))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter % self.every == 0 or runner.iter == runner.max_iters:
            self.save_now(runner, runner.iter)

    def save_now(self, runner: Any, step: int) -> None:
        """Write student.pth and step_N.pth; processes other than the first only give their part."""
        encoder = whole_encoder(runner.model)
        model, optimizer = whole(bare(runner.model).learned.state_dict()), whole(runner.optim_wrapper.state_dict())
        if not is_main_process():
            return
        self.folder.check_here()
        self.save_student(encoder, step)
        path = self.folder.checkpoint(step)
        save_torch(
            {
                "step": step,
                "seconds": time.monotonic() - self.began,
                **self.kept,
                "model": model,
                "optimizer": optimizer,
            },
            path,
        )
        self.folder.rotate(path)
