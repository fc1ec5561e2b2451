"""``track``: train a one-stream tracker on a distilled or pre-trained student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn
from torch.utils.data import DataLoader

from tinymim.data.photos import collate_readable, leave_signals_to_the_main_process
from tinymim.engine.job import Job, run_job
from tinymim.engine.session import data_workers
from tinymim.engine.settings import TrackSettings
from tinymim.errors import ConfigError
from tinymim.files import describe_file, describe_files, sha256_file
from tinymim.models.formats import read_checkpoint
from tinymim.models.registry import create_model_for
from tinymim.models.stored import build_stored
from tinymim.models.weight_files import weights_file
from tinymim.track.method import TrackModel, TrackSchedule, parameter_groups
from tinymim.track.network import Tracker, require_plain
from tinymim.track.pairs import Pairs
from tinymim.track.sequences import Sequence, read_sequences
from tinymim.track.stored import save_tracker

HELD_OUT = 256  # pairs of --val-data that are scored


@dataclass
class TrackResult:
    """Result of training a tracker; ``val_iou`` is the mean overlap on held-out pairs, None without any."""

    out: Path
    tracker: Path
    metrics: Path
    steps: int
    seconds: float
    sequences: int
    val_iou: float | None = None


def train_tracker(recipe: str = TrackSettings.default_recipe, **settings: Any) -> TrackResult:
    """Train a tracker; ``tracker.pth`` holds the last weights.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: Fields of :class:`~tinymim.engine.settings.TrackSettings`; ``data`` is needed.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    return run_job(TrackJob, recipe, settings)


class TrackJob(Job):
    """A tracker of sequences with true boxes."""

    verb = "track"
    settings_type = TrackSettings
    product = "tracker.pth"
    settings: TrackSettings
    model: TrackModel

    def check_recipe(self) -> None:
        if self.config.strategy == "fsdp":
            raise ConfigError(
                "strategy=fsdp", "a tracker is small: every process holds all of it", "leave --strategy out, or use ddp"
            )
        student = self.settings.student
        self.network = build_network(self.config, student)  # its errors come before the data is read
        self.student_sha256 = None if student is None else sha256_file(weights_file(student))

    def read_data(self) -> int:
        s, config = self.settings, self.config
        if s.max_steps is not None:  # an epoch is a number of pairs, drawn anew: the steps decide how many there are
            config.epochs = s.max_steps / max(config.samples // config.batch_size, 1)
        self.sequences = read_sequences(s.data)
        self.held_out = read_sequences(s.val_data, option="--val-data") if s.val_data else None
        return int(config.samples)

    def more_settings(self) -> dict[str, Any]:
        student = self.settings.student
        return {
            "student_file": None if student is None else str(student),
            "sequences": len(self.sequences),
            "frames": sum(map(len, self.sequences)),
        }

    def make_model(self, autocast: torch.dtype | None) -> TrackModel:
        return TrackModel(self.network, autocast=autocast)

    @property
    def patch_size(self) -> int:
        return int(self.network.backbone.patch_size)

    def describe(self) -> str:
        frames = sum(map(len, self.sequences))
        blocks = ", ".join(map(str, sorted(self.network.eliminate_in))) if self.config.keep < 1 else "no block"
        return (
            f"{len(self.sequences)} sequences, {frames:,} frames; template {self.config.template_size}, search crop "
            f"{self.config.img_size} pixels; {self.config.keep:g} of the patches kept in {blocks}\n"
            + str(self.arithmetic).replace("photos", "pairs an epoch", 1)
        )

    def pairs(self, sequences: list[Sequence], samples: int, *, train: bool) -> Pairs:
        """The pairs of a recipe."""
        config = self.config
        return Pairs(
            sequences,
            samples=samples,
            sizes=(config.template_size, config.img_size),
            factors=(config.template_factor, config.search_factor),
            gap=config.gap,
            shift=config.shift,
            scale=config.scale,
            seed=config.seed,
            train=train,
        )

    def photos(self) -> Pairs:
        return self.pairs(self.sequences, self.config.samples, train=True)

    def val_loader(self) -> DataLoader | None:
        if self.held_out is None:
            return None
        return DataLoader(
            self.pairs(self.held_out, HELD_OUT, train=False),
            sampler=[(0, i) for i in range(self.rank, HELD_OUT, self.world)],  # type: ignore[arg-type]
            batch_size=max(self.arithmetic.micro_batch, 1),
            num_workers=(workers := data_workers(self.config, self.place)),
            persistent_workers=workers > 0,
            collate_fn=collate_readable,
            worker_init_fn=leave_signals_to_the_main_process,
        )

    def advice(self) -> str:
        return f"--workers {2 * max(data_workers(self.config, self.place), 1)}"

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.network, self.config.backbone_lr, self.config.weight_decay)

    def hooks_before(self, optimizer: torch.optim.Optimizer) -> list[Hook]:
        config, plan = self.config, self.arithmetic
        shares = (config.drop_at, config.keep, config.keep_from, config.keep_to)
        return [TrackSchedule(plan.steps, plan.warmup, plan.peak_lr, *shares)]

    def inputs(self) -> dict[str, Any]:
        s = self.settings
        groups = ((s.data, self.sequences), (s.val_data, self.held_out))
        data, val_data = (
            describe_files(folder, [path for each in found for path in each.frames]) if folder and found else None
            for folder, found in groups
        )
        return {
            "student": describe_file(weights_file(s.student)) if s.student else None,
            "data": data,
            "val_data": val_data,
        }

    def save(self, network: nn.Module, path: Path, step: int) -> None:
        assert isinstance(network, Tracker)
        save_tracker(
            network,
            path,
            {
                "recipe": Path(self.recipe).stem,
                "method": self.config.method,
                "student_sha256": self.student_sha256,
                "steps": self.arithmetic.steps,
                "step": step,
            },
        )

    def result(self, seconds: float) -> TrackResult:
        out, steps, count = self.folder, self.arithmetic.steps, len(self.sequences)
        if self.settings.dry_run:
            return TrackResult(out, Path(), Path(), steps, seconds, count)
        scores = self.monitor.last_val
        return TrackResult(out, out / self.product, out / "metrics.jsonl", steps, seconds, count, scores.get("val_iou"))


def build_network(config: Any, student: str | Path | None) -> Tracker:
    """The tracker of a recipe, on the student of a file (its width, depth and heads) or on random weights.

    Raises:
        TinyMIMError: no such file, one of a hierarchical model, an unknown head count, or sizes that do not fit.
    """
    arguments = {"drop_path_rate": float(config.drop_path), **config.student_args}
    size = config.img_size
    if student is not None:
        file = read_checkpoint(student)
        if "name" in file.config:  # ours, not plain: that it is is the error, not that it fits no plain model
            require_plain(build_stored(file.config, file.state, file.path))
        size = file.config.get("img_size", size)
    torch.manual_seed(config.seed)
    backbone = create_model_for(config.student, student, img_size=size, num_heads=config.num_heads, arguments=arguments)
    backbone.set_grad_checkpointing(bool(config.grad_checkpointing))
    return Tracker(
        backbone,
        template_size=config.template_size,
        search_size=config.img_size,
        template_factor=float(config.template_factor),
        search_factor=float(config.search_factor),
        eliminate_in=config.eliminate_in,
        keep=float(config.keep),
        channels=config.channels,
    )
