"""``detect``: train a detector on a distilled or pre-trained student."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn
from torch.utils.data import DataLoader

from tinymim.det.coco import Coco, CocoPhotos, read_coco, tools
from tinymim.det.detector import Detector
from tinymim.det.evaluate import DetectionScores, evaluate_detector
from tinymim.det.method import DetectModel, StepSchedule
from tinymim.det.stored import load_detector, save_detector
from tinymim.engine.job import Job, run_job
from tinymim.engine.settings import DetectSettings
from tinymim.errors import ConfigError
from tinymim.files import describe_file, describe_files, write_json
from tinymim.models.backbone import Layers, decay_groups
from tinymim.models.registry import create_model_for
from tinymim.models.weight_files import weights_file


@dataclass
class DetectResult:
    """Result of training a detector; ``scores`` are those of the held-out photos, None without any."""

    out: Path
    detector: Path
    metrics: Path
    steps: int
    seconds: float
    classes: int
    photos: int
    scores: DetectionScores | None = None

    def to_json(self) -> Path:
        """Write ``result.json`` into the run folder; return its path."""
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_json(self.out / "result.json", values)
        return self.out / "result.json"


def detect(recipe: str = DetectSettings.default_recipe, **settings: Any) -> DetectResult:
    """Train a detector; ``detector.pth`` holds the last weights, ``result.json`` the scores.

    Args:
        recipe: Name of a shipped recipe, or a file.
        settings: Fields of :class:`~tinymim.engine.settings.DetectSettings`; ``data`` and ``annotations`` are needed.

    Raises:
        TinyMIMError: see the message; bad input exits 2, a non-finite loss 1.
    """
    return run_job(DetectJob, recipe, settings)


class DetectJob(Job):
    """A detector of labelled objects."""

    verb = "detect"
    settings_type = DetectSettings
    product = "detector.pth"
    scores = tuple(each.name for each in fields(DetectResult))
    settings: DetectSettings
    model: DetectModel

    def check_recipe(self) -> None:
        tools()
        s, config = self.settings, self.config
        if s.annotations is None:
            raise ConfigError("no annotations", "--annotations is missing", "add --annotations FILE.json")
        if (s.val_data is None) != (s.val_annotations is None):
            raise ConfigError(
                "held-out photos", "--val-data and --val-annotations belong together", "give both, or neither"
            )
        if config.strategy == "fsdp":
            raise ConfigError("strategy=fsdp", "every process holds all of a detector", "use ddp")
        if config.img_size % 32:
            raise ConfigError(f"{config.img_size} pixels", "a detector needs a multiple of 32", "e.g. --img-size 640")

    def read_data(self) -> int:
        s = self.settings
        assert s.annotations is not None
        self.train_set = read_coco(s.annotations, s.data)
        self.held_out: Coco | None = None
        if s.val_data is not None and s.val_annotations is not None:
            classes = self.train_set.classes
            self.held_out = read_coco(s.val_annotations, s.val_data, classes=classes, option="--val-annotations")
        if self.config.masks and not self.train_set.with_masks:
            raise ConfigError(
                f"some objects of {s.annotations} have no mask",
                "Mask R-CNN learns from masks",
                "--cfg-options masks=False for boxes only",
            )
        count = len(self.photos())
        if not count:
            raise ConfigError(f"{s.annotations} has no objects", "there is nothing to learn", "add annotations")
        return count

    def more_settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "annotations": str(s.annotations),
            "val_annotations": str(s.val_annotations or ""),
            "student_file": None if s.student is None else str(s.student),
            "classes": self.train_set.classes,
            "photos": len(self.train_set.items),
        }

    def make_model(self, autocast: torch.dtype | None) -> DetectModel:
        config, student = self.config, self.settings.student
        backbone = create_model_for(
            config.student,
            None if student is None else str(student),
            img_size=config.img_size,
            num_heads=config.num_heads,
            arguments={"drop_path_rate": float(config.drop_path), **config.student_args},
        )
        backbone.set_grad_checkpointing(bool(config.grad_checkpointing))
        self.network = Detector(
            backbone,
            self.train_set.classes,
            img_size=config.img_size,
            channels=config.channels,
            anchor_sizes=config.anchor_sizes,
            masks=config.masks,
            autocast=autocast,
        )
        return DetectModel(self.network)

    @property
    def patch_size(self) -> int:
        return 32

    def describe(self) -> str:
        return "\n".join(str(part) for part in (self.train_set, self.held_out, self.arithmetic) if part is not None)

    def photos(self) -> CocoPhotos:
        config = self.config
        return CocoPhotos(
            self.train_set.items,
            size=config.img_size,
            scale=tuple(config.scale_jitter),
            masks=config.masks,
            seed=config.seed,
        )

    def val_loader(self) -> DataLoader | None:
        return None  # scored at the end: the losses of a detector tell little

    def parameter_groups(self) -> list[dict[str, Any]]:
        backbone, prefix = self.network.backbone, "network.backbone.backbone."
        layers = Layers(backbone)
        groups = decay_groups(
            self.network.named_parameters(),
            lambda name: layers.of(name.removeprefix(prefix)) if name.startswith(prefix) else layers.above,
            backbone.no_weight_decay(),
        )
        rate, decay = self.arithmetic.peak_lr, self.config.weight_decay
        return [
            {
                "params": group.params,
                "peak": rate * self.config.layer_decay ** (layers.above - group.layer),
                "weight_decay": decay if group.decayed else 0.0,
            }
            for group in groups
        ]

    def hooks_before(self, optimizer: torch.optim.Optimizer) -> list[Hook]:
        config, steps = self.config, self.arithmetic.steps
        return [StepSchedule(steps, min(config.warmup_steps, steps // 4), tuple(config.drops))]

    def inputs(self) -> dict[str, Any]:
        s = self.settings
        sets = (("data", s.data, self.train_set), ("val_data", s.val_data, self.held_out))
        return {
            "student": describe_file(weights_file(s.student)) if s.student else None,
            "annotations": describe_file(self.train_set.file),
            "val_annotations": describe_file(self.held_out.file) if self.held_out else None,
            **{name: describe_files(folder, [i.path for i in of.items]) for name, folder, of in sets if folder and of},
        }

    def save(self, network: nn.Module, path: Path, step: int) -> None:
        assert isinstance(network, Detector)
        meta = {"recipe": Path(self.recipe).stem, "method": self.config.method}
        save_detector(network, path, meta | {"steps": self.arithmetic.steps, "step": step})

    def result(self, seconds: float) -> DetectResult:
        steps, classes, photos = self.arithmetic.steps, len(self.train_set.classes), len(self.train_set.items)
        out = self.folder
        if self.settings.dry_run:
            return DetectResult(out, Path(), Path(), steps, seconds, classes, photos)
        found = DetectResult(out, out / self.product, out / "metrics.jsonl", steps, seconds, classes, photos)
        if self.held_out is not None and self.rank == 0:
            found.scores = evaluate_detector(self.network, self.held_out)
        if self.rank == 0:
            found.to_json()
        return found


def score_detector(
    file: str | Path, data: str | Path, annotations: str | Path, device: str | None = None
) -> DetectionScores:
    """Score a ``detector.pth``.

    Args:
        file: The detector.
        data: Folder of photos.
        annotations: JSON file in COCO's format.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.

    Raises:
        TinyMIMError: files that cannot be read, other classes, or pycocotools is not installed.
    """
    from tinymim.compat import use_device

    model, _ = load_detector(file)
    coco = read_coco(annotations, data, classes=model.classes)
    return evaluate_detector(model.to(use_device(device)), coco)
