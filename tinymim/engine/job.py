"""One training run of any kind: plan, open, build, loop, result.

A job is a subclass that provides data, model, hooks and result; see ``pretraining.py`` and ``finetuning.py``.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tinymim.compat import use_device
from tinymim.distill.method import find_method
from tinymim.engine.compiling import compile_student
from tinymim.engine.hooks import MonitorHook, SaveHook, StatisticsHook
from tinymim.engine.log_backends import check_backends, log_hooks
from tinymim.engine.model import Trainable, pick_precision
from tinymim.engine.parallel import average, check_strategy, shard, together, whole_encoder
from tinymim.engine.plan import Plan, make_plan, measure, micro_batch, padding
from tinymim.engine.recipe import load_recipe
from tinymim.engine.run_folder import is_product, on_first_process
from tinymim.engine.session import (
    BEFORE,
    join_processes,
    make_runner,
    open_folder,
    resume_state,
    train,
    train_loader,
    waiting_advice,
)
from tinymim.engine.settings import Settings
from tinymim.files import noted_output
from tinymim.folders import OpenRun, open_run
from tinymim.progress import say
from tinymim.records import read_env


class Job(ABC):
    """A recipe and settings, run by :meth:`run`.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: The options of the run.

    Attributes:
        verb: The command.
        settings_type: Class of its settings.
        product: The file of weights it writes into the run folder.
        scores: Names of the values in its ``result.json``; empty: it writes none.
        config: The resolved recipe.
        place: "cpu" or "cuda".
        rank: Number of this process.
        world: Number of processes.
        arithmetic: Steps, batch and learning rate.
        folder: Run folder.
        state: The checkpoint that a resumed run continues from, or None.
        chosen: What a resumed run has chosen: ``micro_batch``, ``compiled``.
        model: The model that is trained.
        monitor: Losses and scores of the loop.
    """

    verb: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    product: ClassVar[str]
    scores: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: str, settings: Any) -> None:
        self.recipe, self.settings = recipe, settings
        self.state: dict[str, Any] | None = None
        self.chosen: dict[str, Any] = {}

    def run(self) -> Any:
        """Run the job.

        Raises:
            TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
        """
        with together(), ExitStack() as held:
            self.plan()
            self.open(held)
            self.build()
            if self.settings.dry_run:
                measure(self.model, self.config, self.arithmetic, self.place)
                return self.result(0.0)
            return self.result(self.loop())

    def plan(self) -> None:
        """Resolve the recipe, find the data, compute batch, steps and rate."""
        self.config: Config = load_recipe(self.recipe, self.settings.overrides(), self.verb)
        self.check_recipe()
        self.backends = check_backends(self.settings.log)
        self.place = use_device(self.settings.device)
        self.options: dict[str, Any] = {}  # of MMEngine's Runner
        self.rank, self.world = join_processes(self.place, self.options)
        check_strategy(self.config.strategy, self.world)
        photos = self.read_data()
        self.arithmetic: Plan = make_plan(self.config, photos, self.world, self.settings.lr, self.settings.max_steps)
        self.check_plan()

    def open(self, held: ExitStack) -> None:
        """Hold the run folder, or refuse one that is in use; find the checkpoint to resume from."""
        self.resolved = {
            **json.loads(json.dumps(self.config.to_dict())),
            "data": str(self.settings.data),
            "val_data": str(self.settings.val_data or ""),
            "lr": self.settings.lr,
            "max_steps": self.settings.max_steps,
            "world": self.world,
            **self.more_settings(),
        }
        self.folder = Path(self.settings.out or f"runs/{Path(self.recipe).stem}")
        if self.settings.dry_run:
            return
        resume, overwrite = self.settings.resume, self.settings.overwrite

        def hold() -> bool:
            self.opened: OpenRun = held.enter_context(open_run(self.folder, resume=resume, overwrite=overwrite))
            return self.opened.fresh

        self.changed = False
        if not on_first_process(hold):
            self.state, self.changed = resume_state(self.folder, self.resolved)
            self.config.merge_from_dict({key: self.resolved[key] for key in BEFORE if key in self.resolved})
            begun = on_first_process(lambda: read_env(self.folder).get("inputs", {}))
            self.chosen = self.state or begun

    def build(self) -> None:
        """Build the model on its device, and choose the number of images per pass."""
        torch.manual_seed(self.config.seed)
        autocast, self.scaled = pick_precision(self.config.precision, self.place)
        self.model: Trainable = self.make_model(autocast).to(self.place)
        self.model.prepare(torch.float16 if self.scaled else autocast or torch.float32)
        plan, share = self.arithmetic, self.arithmetic.batch // self.world
        if self.state is not None:
            self.model.learned.load_state_dict(self.state["model"])
        most, compiled = self.chosen.get("micro_batch", 0), self.chosen.get("compiled")
        if compiled is not None:
            self.config.compile = "on" if compiled else "off"
        with torch.autocast(self.place, torch.float16, enabled=self.scaled):
            if most:
                plan.micro_batch = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
            else:
                plan.micro_batch, how = micro_batch(self.config, self.model, share, self.place)
                plan.notes += [how] if how else []
            self.compiled, how = compile_student(self.config, self.model, plan.micro_batch, self.place)
            plan.notes += [how] if how else []
        plan.notes += padding(self.config.img_size, self.patch_size)
        if self.rank == 0:
            say(self.describe())

    def loop(self) -> float:
        """Train; return the seconds of all sessions."""
        plan, config = self.arithmetic, self.config
        start = int(self.state["step"]) if self.state else 0
        by_rows = self.state is None or self.state.get("by_rows", False)
        model: Any = self.model
        if self.world > 1 and config.strategy == "fsdp":
            model = shard(self.model, self.model.example(config, 2, self.place), self.place)
        elif self.world > 1:
            model = average(self.model, self.place)
        loader = train_loader(self.photos(), plan, config, self.place, start=start, rank=self.rank, world=self.world)
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=plan.peak_lr, betas=tuple(config.betas), fused=True)
        optimizer.register_load_state_dict_pre_hook(keep_fused)
        self.model.guard(optimizer)
        self.monitor = MonitorHook(
            self.folder,
            getattr(self.settings, "title", None) or find_method(config.method).title,
            1 if self.place == "cpu" else 10,
            self.val_loader(),
            config.val_every or plan.steps_per_epoch,
            self.advice(),
        )
        saver = SaveHook(
            self.folder,
            config.save_every or plan.steps_per_epoch,
            self.write_product,
            self.state,
            {"micro_batch": plan.micro_batch, "compiled": self.compiled, "by_rows": by_rows},
        )
        hooks = [StatisticsHook(self.model.learned), *self.hooks_before(optimizer), self.monitor]
        logged = log_hooks(self.backends, self.folder, tensorboard=config.get("tensorboard", False))
        hooks += [*self.hooks_after(), *logged, saver]
        on_first_process(
            lambda: open_folder(
                self.opened,
                self.resolved,
                {**self.inputs(), "micro_batch": plan.micro_batch, "compiled": self.compiled},
                anew=self.state is None,
                changed=self.changed,
            )
        )
        runner = make_runner(
            self.folder,
            model,
            loader,
            plan,
            config,
            optimizer,
            hooks,
            scaled=self.scaled,
            start=start,
            by_rows=by_rows,
            options=self.options,
        )
        if start == plan.steps:
            encoder = whole_encoder(model)
            if self.rank == 0 and not self.has_product(start):
                self.write_product(encoder, start)
        try:
            return train(runner, self.folder) + (self.state or {}).get("seconds", 0.0)
        finally:
            self.monitor.close()

    def write_product(self, network: nn.Module, step: int) -> None:
        """Write the weights that are kept, and their sha256 into ``env.json``."""
        with noted_output(self.folder, self.product):
            self.save(network, self.folder / self.product, step)

    def has_product(self, step: int) -> bool:
        """Whether the weights that are kept are there, as ``env.json`` knows them, and those of a step."""
        return is_product(self.folder / self.product, step=step)

    # what a job provides -------------------------------------------------------------------------------------------

    def check_recipe(self) -> None:  # noqa: B027 (most jobs have nothing to refuse)
        """Refuse settings that contradict the recipe."""

    @abstractmethod
    def read_data(self) -> int:
        """Find training and held-out photos; return the number of training photos."""

    def check_plan(self) -> None:  # noqa: B027
        """Refuse a batch the job cannot train with."""

    @abstractmethod
    def more_settings(self) -> dict[str, Any]:
        """Settings that ``config.py`` of the run folder records in addition to the recipe and the common ones."""

    @abstractmethod
    def make_model(self, autocast: torch.dtype | None) -> Trainable:
        """The model, with ``init_from`` or the student's weights loaded."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Patch size of the network, pixels."""

    def describe(self) -> str:
        """The text printed before the run."""
        return str(self.arithmetic)

    @abstractmethod
    def photos(self) -> Dataset[Any]:
        """Training photos; keys are (epoch, index)."""

    @abstractmethod
    def val_loader(self) -> DataLoader | None:
        """This process's share of the held-out photos."""

    def advice(self) -> str:
        """What to type where the steps wait for photos."""
        return waiting_advice(self.config, self.place, self.settings.data)

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of AdamW."""

    @abstractmethod
    def hooks_before(self, optimizer: torch.optim.Optimizer) -> list[Hook]:
        """Hooks that run before the losses are logged: the schedule, changes to a batch or the weights."""

    def hooks_after(self) -> list[Hook]:
        """Hooks that run after the losses are logged and before the model is saved: measurements."""
        return []

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """The files the run reads, for ``env.json``."""

    @abstractmethod
    def save(self, network: nn.Module, path: Path, step: int) -> None:
        """Write the product."""

    @abstractmethod
    def result(self, seconds: float) -> Any:
        """The result of the run; of a dry run, with 0 seconds, only the plan."""


def keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer as a fused one loads it; older runs stored another kind."""
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def run_job(job: type[Job], recipe: str, settings: Mapping[str, Any]) -> Any:
    """Run a job with settings by name.

    Raises:
        TypeError: no such setting, or ``data`` is missing.
        TinyMIMError: see the message.
    """
    return job(recipe, job.settings_type(**settings)).run()
