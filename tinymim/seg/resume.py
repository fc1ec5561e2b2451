"""Resuming a segmentation run: what may have changed since it began, and what follows from a changed rate."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from tinymim.engine.parallel import ShardedModel, called_blocks, send, shard_like, shard_moments, shard_parts
from tinymim.engine.run_folder import bare
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import sha256_file, write_text
from tinymim.folders import OpenRun
from tinymim.models.weight_files import torch_load
from tinymim.records import read_env
from tinymim.seg.inference import batched
from tinymim.seg.loss import tile_losses

# What decides the numbers of training; other nodes of a config (scoring, hooks, helper variables) may change freely
COMPARED = (
    "model",
    "teacher",
    "train_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "randomness",
    "auto_scale_lr",
)
FREE = re.compile(
    r"(num_workers|persistent_workers|pin_memory|prefetch_factor|data_root|init_cfg(\..*)?|val_\w+|"
    r"teacher\.checkpoint)$"
)
# What may change and is said: the length of the run, with its schedule, and what helps if the loss is not finite
SAID = re.compile(r"train_cfg\.max_iters|optim_wrapper\.(optimizer\.lr|type|dtype|loss_scale(\..*)?|clip_grad(\..*)?)")
MOVING = {"last_step", "_global_step", "_last_value", "verbose", "best", "num_bad_epochs", "cooldown_counter"}


def check_unchanged(before: Config, cfg: Config, folder: Path) -> list[str]:
    """Compare a config with the one a run was begun with; return the changes that are allowed, for saying them.

    Raises:
        ConfigError: another value changed, or the folder holds another kind of run.
    """
    if "model" not in before or "train_cfg" not in before:
        raise ConfigError(
            f"{folder} holds another kind of run",
            "its config.py is not of a segmentation run",
            "resume it with the command that started it, or choose another --work-dir",
        )
    old, new = (_values({key: config.get(key) for key in COMPARED}) for config in (before, cfg))
    changed = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)}
    longer = "train_cfg.max_iters" in changed
    said = [key for key in changed if SAID.fullmatch(key) or (longer and key.startswith("param_scheduler."))]
    refused = [text for key, text in changed.items() if key not in said]
    if refused:
        kind = "trained with another model" if any(text.startswith("model.") for text in refused) else "begun otherwise"
        raise ConfigError(
            f"{folder} was {kind} ({'; '.join(refused)})",
            "a run can only be resumed with the options it was started with",
            "repeat the first command with --resume, or start a new run with another --work-dir",
        )
    return [changed[key] for key in said]


def check_input(folder: Path, kind: str, file: Path, option: str) -> None:
    """Refuse to resume with another student or teacher than the run's own: it would not be read, or change the run.

    Args:
        folder: The run folder.
        kind: "student" or "teacher".
        file: The file given now.
        option: The option that gives it.

    Raises:
        ConfigError: ``env.json`` notes another one, or none.
    """
    noted = read_env(folder)
    inputs: dict[str, Any] | None = noted.get("inputs") or {} if noted else None
    old, new = (inputs or {}).get(kind) or {}, sha256_file(file)
    if inputs is not None and old.get("sha256") != new:
        raise ConfigError(
            f"the run was started {'with another' if old else 'without a'} {kind}",
            f"sha256 {new}, not {old.get('sha256')}",
            f"resume with the same {option}, or start a new run with another --work-dir",
        )


def check_data(noted: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume on other training photos, or on another number of processes, than ``env.json`` notes.

    Raises:
        ConfigError: they differ.
    """
    fix = "resume with the same data and processes, or start a new run with another --work-dir"
    for name, word in (("data", "training data"), ("pseudo", "pseudo-labelled photos")):
        old, new = noted.get(name) or {}, now.get(name) or {}
        if old and new and old.get("list_sha256") != new["list_sha256"]:
            raise ConfigError(
                f"the run was started with other {word}",
                f"{old.get('folder')} with {old.get('files')} files, now {new['folder']} with {new['files']}; "
                "names or sizes differ",
                fix,
            )
    before = noted.get("processes") or now["processes"]
    if before != now["processes"]:
        raise ConfigError(
            f"the run was started with {before} process(es), not {now['processes']}",
            "the photos per step would change",
            fix,
        )


def _values(node: Any, prefix: str = "") -> dict[str, Any]:
    """A config node as dotted keys -> plain values, without what is free to change; SyncBN counts as BN."""
    if isinstance(node, dict) and node:
        parts = [(f"{prefix}.{key}" if prefix else key, value) for key, value in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        parts = [(f"{prefix}.{i}", value) for i, value in enumerate(node)]
    else:
        plain = list(node) if isinstance(node, tuple) else "BN" if node == "SyncBN" else node
        return {} if FREE.search(prefix) or plain is None else {prefix: plain}
    return {key: value for name, item in parts for key, value in _values(item, name).items()}


class SegRunner(Runner):
    """MMEngine's Runner, which writes nothing before all is built, unpickles nothing, and stretches schedules.

    Attributes:
        opened: The run folder.
    """

    opened: OpenRun

    def build_model(self, model: Any) -> Any:
        """The model, with losses in strips."""
        built = super().build_model(model)
        tile_losses(built)
        return built

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        """MMEngine's DDP on several processes, or FSDP2, whose models have their first weights before."""
        if not self.distributed or (model_wrapper_cfg or {}).get("type") != ShardedModel.__name__:
            return super().wrap_model(model_wrapper_cfg, model)
        place = get_device()
        model = model.to(place)
        model.init_weights()
        photos = torch.zeros(2, 3, 128, 128, device=place)
        blocks = called_blocks(model.backbone, lambda: model.train().backbone(photos))
        send(model)
        shard_parts(model, blocks, place)
        return ShardedModel(model)

    def _init_model_weights(self) -> None:
        if not isinstance(self.model, ShardedModel):
            super()._init_model_weights()

    def build_val_loop(self, loop: Any) -> Any:
        """MMEngine's own loop becomes ours, which takes several photos at once; others stay."""
        if isinstance(loop, dict) and loop.get("type", "ValLoop") == "ValLoop":
            loop = {**loop, "type": "BatchedValLoop"}
            self._val_dataloader: Any = batched(self._val_dataloader)
        return super().build_val_loop(loop)

    def dump_config(self) -> None:
        """Nothing yet: see :meth:`begin`."""

    @master_only
    def begin(self) -> None:
        """Begin the run: all is built and loaded."""
        self.opened.begin()
        write_text(Path(self.work_dir) / "config.py", self.cfg.pretty_text)

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", strict: bool = False, **rest: Any) -> Any:
        """Load the weights of a file, tensors and plain values only; return its content.

        Raises:
            CheckpointError: it is damaged, or does not fit the model.
            ConfigError: it was trained on other classes.
        """
        content = torch_load(Path(filename))
        with _fitting(f"{filename} is no checkpoint of this model", "give a checkpoint of the same config"):
            if self._resume:
                self._check_classes(content["meta"].get("dataset_meta") or {})
                content["message_hub"] = self.message_hub.state_dict()
                content["meta"].pop("config", None)
                content["optimizer"] = shard_moments(content["optimizer"], self.optim_wrapper.optimizer)
            own = bare(self.model).state_dict()
            content["state_dict"] = {k: shard_like(v, own.get(k)) for k, v in content["state_dict"].items()}
            self.call_hook("after_load_checkpoint", checkpoint=content)
            keys = rest.get("revise_keys", [(r"^module\.", "")])
            return _load_checkpoint_to_model(bare(self.model), content, strict, revise_keys=keys)

    def resume(self, filename: str, *args: Any, **rest: Any) -> None:
        """Load weights, optimizer, schedule and step; a schedule or rate that was changed since counts from step 0.

        Raises:
            CheckpointError: not a checkpoint of such a run.
            ConfigError: the run is further than it is to go.
        """
        wanted = [_constants(scheduler) for scheduler in self._schedulers()], self._first_rates()
        with _fitting(f"{filename} cannot be resumed", "remove the file to resume from the one before it"):
            super().resume(filename, *args, **rest)
        if self.iter > self.max_iters:
            raise ConfigError(
                f"the run has done {self.iter} steps, train_cfg.max_iters is {self.max_iters}",
                "it cannot be shortened",
                f"resume with train_cfg.max_iters={self.iter} or more",
            )
        if ([_constants(scheduler) for scheduler in self._schedulers()], self._first_rates()) != wanted:
            self._reschedule(wanted[1])

    def _schedulers(self) -> list[Any]:
        found: Any = getattr(self, "param_schedulers", None)
        return [*found] if isinstance(found, list) else []

    def _first_rates(self) -> list[float]:
        """The rate of every parameter group before any schedule."""
        return [group.get("initial_lr", group["lr"]) for group in self.optim_wrapper.param_groups]

    def _reschedule(self, rates: list[float]) -> None:
        """Give the groups their first rates and take every step of the schedule again."""
        for group, rate in zip(self.optim_wrapper.param_groups, rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        if self._schedulers():
            self.param_schedulers = self.build_param_scheduler(copy.deepcopy(self.cfg.param_scheduler))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "scheduler.step() before optimizer.step()"
            for _ in range(self.iter):
                for scheduler in self._schedulers():
                    if not scheduler.by_epoch:
                        scheduler.step()

    def _check_classes(self, meta: dict[str, Any]) -> None:
        old, new = ([*(names.get("classes") or ())] for names in (meta, self.train_dataloader.dataset.metainfo))
        if old and new and old != new:
            first = next((f"{a!r}, now {b!r}" for a, b in zip(old, new, strict=False) if a != b), "")
            raise ConfigError(
                "the run was started with other classes",
                f"{len(old)}, now {len(new)}; the first that differs: {first or 'behind the shorter list'}",
                "resume with the same dataset.json, or start a new run with another --work-dir",
            )


@contextmanager
def _fitting(what: str, fix: str) -> Iterator[None]:
    """Turn what MMEngine raises on a file of another model into our error.

    Raises:
        CheckpointError: the file does not fit.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise CheckpointError(what, f"{type(error).__name__}: {str(error)[:200]}", fix) from error


def _constants(scheduler: Any) -> dict[str, Any]:
    """What a schedule was made of, without how far it is."""
    return {key: value for key, value in scheduler.state_dict().items() if key not in MOVING}
