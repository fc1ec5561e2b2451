"""Health metrics during a run: the student's health, k-NN and linear probe at the start, at intervals, at the end.

They do not affect training: evaluation mode, no gradients, random state restored. Only the first process measures.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from tinymim.analysis.health import (
    LAYERS,
    OUTLIER_LIMIT,
    Outlier,
    activation_outliers,
    attention_entropy,
    method_head_kl,
)
from tinymim.analysis.probes import embed, knn_accuracy, linear_probe, trained_depth
from tinymim.analysis.similarity import is_hierarchical
from tinymim.data.imagenet import ClassFolder, read_class_folder
from tinymim.data.photos import Photos, collate
from tinymim.engine.model import PretrainModel
from tinymim.engine.parallel import gathered
from tinymim.engine.run_folder import bare
from tinymim.errors import ConfigError
from tinymim.progress import say

HEALTH_PHOTOS = 32  # photos whose activations are measured
BATCH = 64  # photos embedded at once
INT8 = "tinymim-export --checkpoint segmentor.pth --precision int8 --calibration PHOTOS --data FOLDER"
MIN_PER_CLASS = 5  # smallest number of photos per class of a probe
HOLD_OUT_EVERY = 5  # in a folder without train/ and val/, every fifth photo is for validation


@dataclass
class Probe:
    """Labelled photos for k-NN and linear probe: (file, class id) pairs."""

    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]


def read_probe(folder: str | Path, most: int) -> Probe:
    """Labelled photos of FOLDER/train and FOLDER/val, or of one folder of classes, every fifth photo held out.

    Args:
        folder: The folder.
        most: Largest number of photos of each part, drawn with a fixed seed: the same number per class, at least
            :data:`MIN_PER_CLASS`; with too many classes only some of them (for 500 photos, 100 of ImageNet's classes).

    Raises:
        DataError: see :func:`tinymim.data.imagenet.read_class_folder`.
    """
    folder = Path(folder)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train = read_class_folder(folder / "train")
        val = read_class_folder(folder / "val", train.classes)
        return Probe(_draw(train, most, most), _draw(val, most, most))
    pairs = _draw(read_class_folder(folder), HOLD_OUT_EVERY * most, most)
    held_out = [pair for i, pair in enumerate(pairs) if i % HOLD_OUT_EVERY == 0][:most]
    return Probe([pair for i, pair in enumerate(pairs) if i % HOLD_OUT_EVERY][:most], held_out)


def _draw(folder: ClassFolder, count: int, most: int) -> list[tuple[Path, int]]:
    """Photos of evenly spread classes, one of each class in turn."""
    classes = len(folder.classes)
    kept = max(min(classes, most // MIN_PER_CLASS), min(classes, 2))
    chosen = {i * classes // kept for i in range(kept)}
    order = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0)).tolist()
    seen: dict[int, int] = {}
    ranked = []
    for i in order:
        label = int(folder.labels[i])
        if label in chosen:
            seen[label] = seen.get(label, 0) + 1
            ranked.append((seen[label], i))
    ranked.sort(key=lambda pair: pair[0])  # stable: keeps the drawn order within a rank
    return [(folder.files[i], int(folder.labels[i])) for _, i in ranked[:count]]


def health_hooks(out: Path, config: Config, epoch: int, photos: list[Path], probe: Probe | None) -> list[Hook]:
    """The hooks that a recipe enables for the health of its student.

    Args:
        out: Run folder.
        config: Recipe.
        epoch: Steps per epoch.
        photos: Held-out photos, or the training photos.
        probe: Labelled photos, or None.

    Raises:
        ConfigError: labelled photos, but health metrics are off.
    """
    hooks: list[Hook] = []
    every = epoch if config.watch_every is None else config.watch_every
    if every:
        hooks.append(HealthHook(out, photos, config.img_size, every, probe, config.decode))
    elif probe is not None:
        raise ConfigError(
            "labelled photos for a run without health metrics",
            "watch_every is 0",
            "leave --probe-data or watch_every out",
        )
    return hooks


@HOOKS.register_module()
class HealthHook(Hook):
    """Measures the student at step 0, every ``every`` steps and at the end; writes scalars into metrics.jsonl.

    ``kl_qk/head_05`` (nats), ``entropy/block_03/head_02`` (share of log T), ``outlier/block_03/fc1`` and
    ``outlier_channel/block_03/fc1`` (see :func:`tinymim.analysis.health.activation_outliers`), ``outlier/limit``,
    ``knn_top1``, ``linear_top1`` (fractions), ``probe_classes`` (number of classes). In the block after the last fully
    trained one, only the input of qkv is measured. Of a hierarchical student only the probes are measured.

    Args:
        out: Run folder.
        photos: Photos to choose from, evenly spread.
        img_size: Side of the central crops, pixels.
        every: Steps between measurements.
        probe: Labelled photos, or None.
        decode: The recipe's way to decode photos.
    """

    def __init__(
        self, out: Path, photos: list[Path], img_size: int, every: int, probe: Probe | None, decode: str
    ) -> None:
        self.out, self.img_size, self.every, self.probe, self.decode = out, img_size, every, probe, decode
        self.photos = (
            [photos[i * len(photos) // HEALTH_PHOTOS] for i in range(HEALTH_PHOTOS)]
            if len(photos) > HEALTH_PHOTOS
            else photos
        )
        self.outliers: list[dict[str, Outlier]] = []

    def before_train(self, runner: Any) -> None:
        if runner.iter == 0:
            self._measure(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter % self.every == 0 or runner.iter == runner.max_iters:
            self._measure(runner)

    def after_train(self, runner: Any) -> None:
        if text := outlier_warning(self.outliers):
            say(text)

    @torch.no_grad()
    def _measure(self, runner: Any) -> None:
        with gathered(runner.model):
            if not is_main_process():
                return
            model = bare(runner.model)
            device = next(model.parameters()).device
            model.eval()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                values = self._health_values(model, self._pixels(self.photos, device))
                if self.probe is not None:
                    values |= self._probe_values(self.probe, model, device)
            runner.model.train()
        if values:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": runner.iter, **values}) + "\n")

    def _health_values(self, model: PretrainModel, pixels: Tensor) -> dict[str, float]:
        encoder: Any = model.method.student
        views = model.views(pixels)
        own = views[0]
        values: dict[str, float] = {}
        if is_hierarchical(encoder):
            return values  # what is measured is read inside plain blocks
        for teacher, method, images in model.method.relation_pairs(views):
            for relation, kl_M in method_head_kl(method, own, images).items():
                values |= {f"kl_{teacher}{relation}/head_{i:02d}": kl for i, kl in enumerate(kl_M.tolist(), 1)}
        for block, shares in enumerate(attention_entropy(encoder, own)[1].tolist(), 1):
            values |= {f"entropy/block_{block:02d}/head_{i:02d}": share for i, share in enumerate(shares, 1)}
        whole = trained_depth(encoder)  # of the block after it, only q, k, v are trained
        self.outliers = [
            found if block <= whole else {"qkv": found["qkv"]}
            for block, found in enumerate(activation_outliers(encoder, own), 1)
        ]
        for block, found in enumerate(self.outliers, 1):
            for name, outlier in found.items():
                values[f"outlier/block_{block:02d}/{name}"] = outlier.ratio
                values[f"outlier_channel/block_{block:02d}/{name}"] = outlier.channel
        return values | {"outlier/limit": OUTLIER_LIMIT}

    def _probe_values(self, probe: Probe, model: PretrainModel, device: torch.device) -> dict[str, float]:
        train, train_labels = self._embed(probe.train, model, device)
        val, val_labels = self._embed(probe.val, model, device)
        return {
            "knn_top1": knn_accuracy(train, train_labels, val, val_labels),
            "linear_top1": linear_probe(train, train_labels, val, val_labels),
            "probe_classes": len(train_labels.unique()),
        }

    def _embed(
        self, pairs: list[tuple[Path, int]], model: PretrainModel, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of the photos that can be read."""
        crops = Photos([path for path, _ in pairs], img_size=self.img_size, train=False, decode=self.decode)
        labels: list[int] = []

        def batches() -> Iterator[Tensor]:
            for first in range(0, len(pairs), BATCH):
                chosen = range(first, min(first + BATCH, len(pairs)))
                items = [(item, pairs[i][1]) for i in chosen if not (item := crops[(0, i)])["skipped"]]
                if items:
                    labels.extend(label for _, label in items)
                    pixels = torch.stack([item["image"] for item, _ in items]).to(device).float() / 255
                    yield model.views(pixels)[0]

        encoder: Any = model.method.student
        features = embed(encoder, batches())
        return features, torch.tensor(labels)

    def _pixels(self, photos: list[Path], device: torch.device) -> Tensor:
        """Central crops, (B, 3, S, S) in 0..1."""
        crops = Photos(photos, img_size=self.img_size, train=False, decode=self.decode)
        return collate([crops[(0, i)] for i in range(len(photos))])["image"].to(device).float() / 255


def outlier_warning(outliers: list[dict[str, Outlier]]) -> str:
    """Warning for the last measurement; empty below :data:`OUTLIER_LIMIT`. The stream stays in float: not counted."""
    worst = [
        (found[name].ratio, block, name) for block, found in enumerate(outliers, 1) for name in LAYERS if name in found
    ]
    over = sorted((entry for entry in worst if entry[0] > OUTLIER_LIMIT), reverse=True)
    if not over:
        return ""
    ratio, block, name = over[0]
    return (
        f"warning: outliers will hurt INT8: in block {block} the largest input of {name} (channel "
        f"{outliers[block - 1][name].channel}) is {ratio:.0f} times the usual one; {len(over)} of {len(worst)} inputs "
        f"exceed {OUTLIER_LIMIT:g}\n"
        f"  why: with one scale per tensor, {127 / ratio:.0f} of 127 levels are left for the usual values\n"
        "  fix: once a segmentor is trained, measure the cost of INT8 per block and keep the worst in float:\n"
        f"       {INT8} --sensitivity\n       {INT8} --onnx int8.onnx --max-miou-drop 0.5"
    )
