"""Models that are compared on the same photos: opening them, the photos as each wants to see them.

Legend: B = photos, S = side in pixels.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.analysis.attention_maps import check_maps
from tinymim.analysis.similarity import SMALLEST, count_outputs, is_hierarchical
from tinymim.data.photo_files import list_photos
from tinymim.data.photos import Photos
from tinymim.data.shards import file_bytes
from tinymim.errors import ConfigError, DataError
from tinymim.files import describe_files, input_name, sha256_file
from tinymim.models import create_model, model_from_checkpoint, model_names
from tinymim.models.backbone import backbone_names
from tinymim.models.teachers import Teacher, load_teacher, renormalise, state_sha256, teacher_prefix
from tinymim.models.tokens import num_heads, patch_size
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.progress import Progress


@dataclass
class Side:
    """A model, and how it sees a photo: (B, 3, S, S) uint8 -> (B, 3, S', S') normalised for it."""

    of: Teacher
    side: int

    @property
    def model(self) -> Any:
        """The network."""
        return self.of.model

    def view(self, pixels: Tensor) -> Tensor:
        """Photos as the model wants them."""
        mean, std = (torch.tensor(row).view(1, 3, 1, 1) for row in (IMAGENET_MEAN, IMAGENET_STD))
        return renormalise(self.of.mean, self.of.std, self.side)((pixels.float() / 255 - mean) / std)

    @property
    def trained(self) -> int:
        """The deepest block whose every part was trained, from 1."""
        return self.of.trained_depth or count_outputs(self.model)

    def facts(self) -> dict[str, Any]:
        """What the page says of it before anything is measured."""
        model, stages = self.model, is_hierarchical(self.model)
        return {
            "from": self.of.name,
            "sha256": self.of.sha256 or state_sha256(model),
            "blocks": count_outputs(model),
            "width": [stage.width for stage in model.stage_info] if stages else int(model.embed_dim),
            "heads": None if stages else num_heads(model),
            "patch": model.stage_info[0].stride if stages else patch_size(model),
            "trained_blocks": self.trained,
        }


def open_model(
    source: str,
    img_size: int,
    weights: str | None = None,
    heads: int | None = None,
    grid: int | None = None,
    *,
    heads_option: str = "--heads",
) -> Side:
    """A model of timm, of a file, or with random weights (always the same) of a model's name.

    Args:
        source: ``timm/NAME``, a file, or a name of :func:`tinymim.create_model`.
        img_size: Side of its photos, pixels.
        weights: File for a model of timm.
        heads: Heads per block, for a file that does not store them.
        grid: Patches per side that a plain model shall see; its photos are resized to them. None: ``img_size``.
        heads_option: What to type for ``heads``, for an error.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: no such model, or its patches do not divide the photo.
    """
    if teacher_prefix(source):
        found = load_teacher(source, img_size=img_size, weights=weights, num_heads=heads, grid=grid)
        side = img_size if grid is None else grid * patch_size(found.model)
        return _whole_patches(Side(found, side), source)
    if weights is not None:
        raise ConfigError(
            f"weights {weights} for {source}", "it is not a model of timm and has its own", 'give "-" in its place'
        )
    if source in (*model_names(), *backbone_names()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(source, img_size=img_size).eval()
        found = Teacher(model, f"{source}, random weights", IMAGENET_MEAN, IMAGENET_STD, None)
    else:
        model, file = model_from_checkpoint(source, num_heads=heads, option=heads_option, say=False)
        mean, std = (tuple(file.meta.get(k) or usual) for k, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
        learned = file.meta.get("relations")
        relations = (int(learned[0]), int(learned[1])) if learned else None
        sha = sha256_file(file.path)
        found = Teacher(model.eval(), input_name(file.path), mean, std, sha, relations, file.meta.get("trained_depth"))
    side = img_size if grid is None or is_hierarchical(model) else grid * patch_size(model)
    return _whole_patches(Side(found, side), source)


def _whole_patches(side: Side, source: str) -> Side:
    """Refuse photos that are no whole number of patches.

    Raises:
        ConfigError: see above.
    """
    if is_hierarchical(side.model):
        return side
    patch = patch_size(side.model)
    if side.side % patch:
        raise ConfigError(
            f"photos of {side.side} pixels are no whole number of {source}'s patches of {patch}",
            "models are compared on the same patches",
            f"--img-size {math.ceil(side.side / patch) * patch}",
        )
    return side


def open_student(source: str, img_size: int, heads: int | None) -> Side:
    """:func:`open_model` of a student whose attention maps can be computed.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: its attention maps cannot be computed, or its patches do not divide the photo.
    """
    side = open_model(source, img_size, heads=heads, heads_option="--student-heads")
    check_maps(side.model)
    return side


def choose_photos(pattern: str, limit: int) -> tuple[list[Path], dict[str, Any]]:
    """Photos evenly spread over all that a pattern names, in random order (the same each time), and their record.

    Raises:
        DataError: see :func:`tinymim.data.photo_files.list_photos`.
    """
    files = list_photos(pattern, option="--photos")
    chosen = files if len(files) <= limit else [files[i * len(files) // limit] for i in range(limit)]
    random.Random(0).shuffle(chosen)
    return chosen, {"pattern": pattern, **record(chosen)}


def record(files: Sequence[Path]) -> dict[str, Any]:
    """Their common folder, their number, and a hash of names and sizes."""
    return describe_files(os.path.commonpath([path.parent for path in files]) or ".", files, file_bytes)


def read_crops(files: Sequence[Path], side: int, what: str) -> tuple[Tensor, list[int]]:
    """Central squares of the photos that can be read, (B, 3, S, S) uint8, and which of the files they are.

    Raises:
        DataError: fewer than 4 can be read.
    """
    crops, line = Photos(files, img_size=side, train=False), Progress(f"read {what}", len(files))
    found: list[Tensor] = []
    kept: list[int] = []
    for i in range(len(files)):
        item = crops[(0, i)]
        if not item["skipped"]:
            found.append(item["image"])
            kept.append(i)
        line.update(i + 1, images=1)
    line.close(f"{len(kept)} photos" + (f", {len(files) - len(kept)} damaged left out" * (len(kept) < len(files))))
    if len(kept) < SMALLEST:
        raise DataError(
            f"{len(kept)} {what} can be read", f"similarity needs {SMALLEST} at least", "name a folder with more photos"
        )
    return torch.stack(found), kept


class Counter:
    """One progress line over all passes through photos."""

    def __init__(self, total: int) -> None:
        self.line, self.done = Progress("measure", total), 0

    def __call__(self, batches: Sequence[Tensor], view: Callable[[Tensor], Any]) -> Iterator[Any]:
        """Each batch as ``view`` makes it; counted when it has been used."""
        for pixels in batches:
            yield view(pixels)
            self.done += len(pixels)
            self.line.update(self.done, images=len(pixels))


def batches_of(pixels: Tensor, batch: int) -> Sequence[Tensor]:
    """Batches of ``batch`` photos or a few more, none of them small."""
    return pixels.tensor_split(max(len(pixels) // batch, 1))


def number(value: float) -> float | None:
    """A number that JSON has; None for the others."""
    return value if math.isfinite(value) else None


def plain(x: Tensor) -> Any:
    """A tensor as nested lists of numbers; None where one is not finite."""
    return [plain(row) for row in x] if x.ndim > 1 else [number(value) for value in x.tolist()]
