"""Shared by pre-training, distillation and fine-tuning: processes, settings of the run folder, MMEngine's Runner."""

import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from torch.utils.data import DataLoader

from tinymim.compat import launched_processes, start_cpu_processes
from tinymim.cores import core_limits
from tinymim.data.photo_files import packed
from tinymim.data.photos import StepSampler, collate, leave_signals_to_the_main_process
from tinymim.engine.loop import StepLoop
from tinymim.engine.model import NonFiniteLoss
from tinymim.engine.plan import Plan
from tinymim.engine.recipe import default_recipe
from tinymim.engine.run_folder import RunFolder, bare, dump_bad_batch, on_first_process
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import atomic_path, write_env
from tinymim.folders import OpenRun
from tinymim.literals import read_literal_file
from tinymim.progress import say
from tinymim.records import read_env

HEALTH_KEYS = {"watch_every", "probe_data", "probe_photos", "tensorboard"}
FILES = {"teacher", "teacher_weights", "store", "student_file"}  # may have moved on resume: env.json has their sha256
MAY_CHANGE = {"workers", "data", "val_data", *FILES, *HEALTH_KEYS}  # on resume; other changes would change the numbers
SAID = {"lr", "precision", "strategy", "world"}  # may change, too, and is said; two are our advice against NaN
# keys that are newer than some runs, and what those did: resumed, they go on with it
BEFORE = {"decode": "whole", "compile": "off"}
UNHASHED = {*MAY_CHANGE, "teachers", "init_from"}  # paths; env.json has the sha256 of the files


def join_processes(place: str, options: dict[str, Any]) -> tuple[int, int]:
    """Join the process group under torchrun (nccl, or gloo on the CPU); return rank and number of processes."""
    if launched_processes() == 1:
        return 0, 1
    if place == "cpu":
        start_cpu_processes(options)
        del options["model_wrapper_cfg"]  # tinymim.engine.parallel wraps
    elif not torch.distributed.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def open_folder(
    opened: OpenRun, settings: dict[str, Any], inputs: dict[str, Any], *, anew: bool, changed: bool = False
) -> None:
    """Begin the run with ``config.py`` (once) and ``env.json``; the first process, when all else is ready.

    Args:
        opened: Run folder.
        settings: Every resolved setting.
        inputs: Files the run reads, with their sha256.
        anew: Whether it starts at step 0, resumed or not.
        changed: Whether ``config.py`` is written again, as settings have changed since.

    Raises:
        ConfigError: the run was started with another teacher, store or student.
    """
    folder, resume = opened.path, not opened.fresh
    before = read_env(folder).get("inputs", {}) if resume else {}
    for key in ("teacher", "store", "student"):
        old, new = ([item.get("sha256") for item in _each(given.get(key))] for given in (before, inputs))
        if old and anew and key == "student" and not new:
            raise ConfigError(
                f"the run was started with the student {before[key]['file']}",
                "it was stopped before its first checkpoint; without the student it would start from random weights",
                "add --student FILE to --resume, or start a new run with --overwrite",
            )
        if old and new and old != new:
            raise ConfigError(
                f"the run was started with another {key}",
                f"sha256 {', '.join(map(str, new))}, not {', '.join(map(str, old))}",
                "resume with the same file, or start a new run with --overwrite",
            )
    opened.begin()
    if changed or not (folder / "config.py").is_file():
        with atomic_path(folder / "config.py") as part:
            part.write_text(
                f'"""Resolved recipe of this run."""\n\n# command: {["tinymim", *sys.argv[1:]]!r}\n\n'
                + "".join(f"{k} = {v!r}\n" for k, v in settings.items()),
                "utf-8",
            )
        (folder / "plots").mkdir(exist_ok=True)
    content = json.dumps({key: value for key, value in settings.items() if key not in UNHASHED}, sort_keys=True)
    write_env(folder, {**inputs, "recipe_sha256": hashlib.sha256(content.encode()).hexdigest()})


def _each(given: Any) -> list[dict[str, Any]]:
    """The entries of ``env.json`` for one file or several."""
    return given if isinstance(given, list) else [given] if given else []


def resume_state(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The state of the newest checkpoint of a run, None without one; and whether settings that may change have changed.

    Args:
        folder: Run folder.
        settings: Every resolved setting; those of :data:`BEFORE` that the run does not know are set to what it did.

    Raises:
        ConfigError: settings differ, or the folder holds no run.
    """
    if not (folder / "config.py").is_file():
        raise ConfigError(f"{folder} holds no run to resume", "config.py is missing", "leave --resume out")
    before = read_literal_file(folder / "config.py")
    if "method" not in before:
        raise ConfigError(
            f"{folder} holds another kind of run",
            "its config.py names no method: 'tinymim segment' writes such runs",
            "resume it with the command that started it, or choose another --out",
        )
    settings |= {key: value for key, value in BEFORE.items() if key in settings and key not in before}
    # keys that are newer than the run have their defaults
    known = {**default_recipe(before.get("method")).to_dict(), **BEFORE}
    before = json.loads(json.dumps({**known, **before}))
    changed = {
        k: f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings.items() if k not in MAY_CHANGE and before.get(k) != v
    }
    if changed.keys() - SAID:
        raise ConfigError(
            "the settings differ from the run's own",
            "; ".join(changed.values()),
            "resume with the same options, or start a new run with --init-from its student.pth",
        )
    if changed and is_main_process():
        say(f"changed since the run began: {'; '.join(changed.values())}")
    newest = on_first_process(RunFolder(folder).newest)
    if newest is None:
        return None, bool(changed)
    try:
        state = torch.load(newest, map_location="cpu", weights_only=True)
        missing = {"step", "micro_batch", "model", "optimizer"} - set(state)
    except Exception as error:  # whole, but no checkpoint: torch raises many kinds
        missing = {f"tensors ({str(error).splitlines()[0][:100]})"}
    if missing:
        raise CheckpointError(
            f"{newest} is no checkpoint of a run",
            f"it holds no {', '.join(sorted(missing))}",
            "remove the file to resume from the one before it",
        )
    return dict(state), bool(changed)


def data_workers(config: Config, place: str) -> int:
    """Data-loading processes of a recipe; None: one where the step itself uses every core, else a core each.

    A worker computes in one thread. Of the machine's cores each of its processes has an equal part and keeps one.
    """
    if config.workers is not None:
        return int(config.workers)
    if place == "cpu":
        return 1
    free = min(limit for name, limit in core_limits().items() if name != "OMP_NUM_THREADS")  # set to 1 by torchrun
    return min(max(int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1), 16)


def waiting_advice(config: Config, place: str, data: str | Path) -> str:
    """What to type where the steps wait for photos."""
    workers = f"--workers {2 * max(data_workers(config, place), 1)}"
    if packed(data) is not None:
        return workers
    words = f"tinymim data --pack {shlex.quote(str(data))} --out SHARDS --img-size {2 * config.img_size}"
    return f"{workers}, or smaller photos in shards ({words}) and --data SHARDS"


def train_loader(
    photos: Any, plan: Plan, config: Config, place: str, *, start: int, rank: int, world: int
) -> DataLoader:
    """This process's share of every batch of a plan, from step ``start`` on; keys are (epoch, index)."""
    order = getattr(photos, "order", None)
    share = dict(start=start, rank=rank, world=world)
    sampler = StepSampler(len(photos), plan.batch, plan.steps, seed=config.seed, order=order, **share)
    return DataLoader(
        photos,
        batch_sampler=sampler,
        num_workers=data_workers(config, place),
        collate_fn=getattr(photos, "collate", collate),
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=place != "cpu",
    )


def make_runner(
    folder: Path,
    model: Any,
    loader: DataLoader,
    plan: Plan,
    config: Config,
    optimizer: torch.optim.Optimizer,
    hooks: list[Any],
    *,
    scaled: bool,
    start: int,
    by_rows: bool,
    options: dict[str, Any],
) -> Any:
    """MMEngine's Runner around our loop.

    Args:
        folder: Run folder.
        model: The BaseModel, wrapped for several processes.
        loader: Batches from ``start`` on.
        plan: Batch, steps and rate.
        config: The recipe.
        optimizer: The optimizer, with its parameter groups.
        hooks: In the order in which they run.
        scaled: Whether float16 losses are scaled.
        start: First step.
        by_rows: See :class:`~tinymim.engine.loop.StepLoop`.
        options: Runner options set by :func:`join_processes`.
    """
    from mmengine.optim import AmpOptimWrapper, OptimWrapper
    from mmengine.runner import Runner

    class Wrapped(Runner):
        """A Runner that leaves the weights alone: MMEngine's sends all of them, teachers too, tensor by tensor."""

        def _init_model_weights(self) -> None:
            pass

    parts = plan.batch // launched_processes() // plan.micro_batch
    wrapper: dict[str, Any] = dict(optimizer=optimizer, accumulative_counts=parts)
    if config.get("clip_grad") is not None:
        wrapper["clip_grad"] = dict(max_norm=config.clip_grad)
    optim = AmpOptimWrapper(dtype="float16", **wrapper) if scaled else OptimWrapper(**wrapper)
    off = dict.fromkeys(("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint"))
    return Wrapped(
        model,
        work_dir=str(folder / "log"),
        train_dataloader=loader,
        train_cfg=dict(
            type=StepLoop.__name__,
            max_iters=plan.steps,
            start=start,
            micro_batch=plan.micro_batch,
            seed=config.seed,
            by_rows=by_rows,
        ),
        optim_wrapper=optim,
        default_hooks=off,
        custom_hooks=hooks,
        default_scope="mmengine",
        launcher=options.pop("launcher", "pytorch" if launched_processes() > 1 else "none"),
        randomness=dict(seed=config.seed),
        log_level="ERROR",
        cfg=options,
        experiment_name=folder.name,
    )


def train(runner: Any, folder: Path) -> float:
    """Run to the end; return the seconds it took.

    Raises:
        NonFiniteLoss: the message gives the files of the batch and of the last good state.
    """
    began = time.monotonic()
    try:
        runner.train()
    except NonFiniteLoss as error:
        batch = bare(runner.model).last_batch
        if not batch:  # the process whose loss it was writes it
            raise
        dump = dump_bad_batch(folder / "bad_batch.pth", runner.iter, batch=batch)
        kept = (
            "the checkpoints hold the last good state" if any(folder.glob("checkpoints/*")) else "nothing was saved yet"
        )
        raise NonFiniteLoss(
            f"{error.what} at step {runner.iter}", f"{error.why}; the batch is in {dump}, {kept}", error.fix
        ) from None
    return time.monotonic() - began
