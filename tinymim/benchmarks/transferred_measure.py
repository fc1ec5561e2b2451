"""The measurements of ``tools/what_was_transferred.py``: a teacher and its students on the same photos.

Legend: B = photos, S = side in pixels, L = blocks, H = heads, N = labelled photos.
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

from tinymim.analysis import attention_stats, cka
from tinymim.analysis.attention_maps import check_maps
from tinymim.analysis.health import LAYERS, OUTLIER_LIMIT, activation_outliers, head_kl
from tinymim.analysis.probes import embed_blocks, knn_accuracy
from tinymim.analysis.similarity import SMALLEST
from tinymim.data.photo_files import list_photos
from tinymim.data.photos import Photos
from tinymim.data.shards import file_bytes
from tinymim.distill import qkv_at
from tinymim.engine.health import HEALTH_PHOTOS, read_probe
from tinymim.errors import ConfigError, DataError
from tinymim.files import describe_files, sha256_file
from tinymim.models import create_model, model_from_checkpoint, model_names
from tinymim.models.teachers import Teacher, default_target_block, load_teacher, renormalise, state_sha256
from tinymim.models.tokens import has_class_token, num_heads, pair_tokens, patch_size
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.progress import Progress
from tinymim_export.report.page import hide_paths

RELATIONS = ("qk", "vv")


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
        return self.of.trained_depth or len(self.model.blocks)

    def facts(self) -> dict[str, Any]:
        """What the page says of it before anything is measured."""
        model = self.model
        return {
            "from": self.of.name,
            "sha256": self.of.sha256 or state_sha256(model),
            "blocks": len(model.blocks),
            "width": int(model.embed_dim),
            "heads": num_heads(model),
            "patch": patch_size(model),
            "trained_blocks": self.trained,
        }


def open_student(source: str, img_size: int, heads: int | None) -> Side:
    """A student of a file, or with random weights (always the same) of a model's name.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: its attention maps cannot be computed, or its patches do not divide the photo.
    """
    if source in model_names():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(source, img_size=img_size).eval()
        found = Teacher(model, f"{source}, random weights", IMAGENET_MEAN, IMAGENET_STD, None)
    else:
        model, file = model_from_checkpoint(source, num_heads=heads, option="--student-heads", say=False)
        mean, std = (tuple(file.meta.get(k) or usual) for k, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
        learned = file.meta.get("relations")
        relations = (int(learned[0]), int(learned[1])) if learned else None
        sha = sha256_file(file.path)
        found = Teacher(model, Path(source).name, mean, std, sha, relations, file.meta.get("trained_depth"))
    check_maps(model)
    if img_size % patch_size(model):
        raise ConfigError(
            f"photos of {img_size} pixels are no whole number of {source}'s patches of {patch_size(model)}",
            "student and teacher are compared on the same patches",
            f"--img-size {math.ceil(img_size / patch_size(model)) * patch_size(model)}",
        )
    return Side(found, img_size)


def open_sides(
    teacher: str, weights: str | None, heads: int | None, students: dict[str, str], student_heads: int | None, side: int
) -> tuple[Side, dict[str, Side]]:
    """Teacher and students; the teacher's photo is resized so that its grid of patches is that of the students.

    Raises:
        CheckpointError: see :func:`open_student`, :func:`tinymim.models.teachers.load_teacher`.
        ConfigError: the same, or the students' grids differ.
    """
    sides = {name: open_student(source, side, student_heads) for name, source in students.items()}
    grids = {name: side // patch_size(student.model) for name, student in sides.items()}
    if len(set(grids.values())) > 1:
        raise ConfigError(
            f"students of other grids: {', '.join(f'{name} {grid} x {grid}' for name, grid in grids.items())}",
            "attention is compared on one grid of patches",
            "compare students of one patch size",
        )
    grid = next(iter(grids.values()))
    found = load_teacher(teacher, img_size=side, weights=weights, num_heads=heads, grid=grid)
    check_maps(found.model)
    return Side(found, grid * patch_size(found.model)), sides


def choose_target(teacher: Side, block: int | None) -> int:
    """The teacher's target block, from 1.

    Raises:
        ConfigError: no such block.
    """
    depth = len(teacher.model.blocks)
    block = default_target_block(depth) if block is None else block
    if not 1 <= block <= depth:
        raise ConfigError(f"--target-block {block}", f"the teacher has {depth} blocks", f"choose 1 to {depth}")
    return block


def choose_photos(pattern: str, limit: int) -> tuple[list[Path], dict[str, Any]]:
    """Photos evenly spread over all that a pattern names, in random order (the same each time), and their record.

    Raises:
        DataError: see :func:`tinymim.data.photo_files.list_photos`.
    """
    files = list_photos(pattern, option="--photos")
    chosen = files if len(files) <= limit else [files[i * len(files) // limit] for i in range(limit)]
    random.Random(0).shuffle(chosen)
    return chosen, {"pattern": hide_paths(pattern), **_record(chosen)}


def _record(files: Sequence[Path]) -> dict[str, Any]:
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


@dataclass
class Labelled:
    """Reference and query photos: crops in batches, and class ids."""

    batches: list[Sequence[Tensor]]
    labels: list[Tensor]
    record: dict[str, Any]


def read_labelled(folder: str, most: int, side: int, batch: int) -> Labelled:
    """Photos of a folder of classes, or of ``train/`` and ``val/`` in it, for k-NN.

    Raises:
        DataError: see :func:`tinymim.engine.health.read_probe`.
    """
    probe = read_probe(folder, most)
    parts = {"train": probe.train, "val": probe.val}
    found = Labelled(
        [], [], {"folder": Path(folder).resolve().name, "classes": len({label for _, label in probe.train})}
    )
    for name, pairs in parts.items():
        pixels, kept = read_crops([path for path, _ in pairs], side, f"labelled photos ({name})")
        found.batches.append(batches_of(pixels, batch))
        found.labels.append(torch.tensor([pairs[i][1] for i in kept]))
        found.record[name] = {**_record([path for path, _ in pairs]), "used": len(kept)}
    return found


def batches_of(pixels: Tensor, batch: int) -> Sequence[Tensor]:
    """Batches of ``batch`` photos or a few more, none of them small."""
    return pixels.tensor_split(max(len(pixels) // batch, 1))


@torch.no_grad()
def measure(
    teacher: Side, students: dict[str, Side], target: int, batches: Sequence[Tensor], labelled: Labelled | None
) -> dict[str, Any]:
    """All numbers of the page, as plain values.

    Returns:
        ``teacher`` and ``students`` (by name): see :meth:`Side.facts`; ``distance`` and ``entropy`` (L, H), pixels of
        the students' photos and nats; ``knn``: feature -> top-1 by block. Students: ``cka`` (L, L of the teacher);
        ``kl``: relation -> (H,) at ``kl_block``, None where the teacher's heads do not divide the width;
        ``outliers``: by block, layer -> ratio;
        both on the first 32 photos, as the health metrics of a run.
    """
    photos = sum(map(len, batches))
    probed = sum(map(len, labelled.labels)) if labelled else 0
    counted = Counter(photos + probed + len(students) * (2 * photos + probed))
    found: dict[str, Any] = {"teacher": common(teacher, batches, labelled, counted), "students": {}}
    scale = next(iter(students.values())).side / teacher.side  # to pixels of the students' photos
    found["teacher"]["distance"] = [[scale * x for x in heads] for heads in found["teacher"]["distance"]]
    for name, student in students.items():

        def both(pixels: Tensor, student: Side = student) -> tuple[Tensor, Tensor]:
            return student.view(pixels), teacher.view(pixels)

        similar = cka(student.model, teacher.model, counted(batches, both))
        block = student.of.relations[0] if student.of.relations else len(student.model.blocks)
        views = both(torch.cat(list(batches))[:HEALTH_PHOTOS])
        found["students"][name] = {
            **common(student, batches, labelled, counted),
            "cka": plain(similar),
            "kl_block": block,
            "kl": relations_kl(student.model, teacher.model, (block, target), views),
            "outliers": [
                {layer: number(seen[layer].ratio) for layer in LAYERS}
                for seen in activation_outliers(student.model, views[0])
            ],
        }
    counted.line.close("done")
    return found | {"outlier_limit": OUTLIER_LIMIT}


def common(side: Side, batches: Sequence[Tensor], labelled: Labelled | None, counted: Counter) -> dict[str, Any]:
    """What is measured of teacher and student alike."""
    stats = attention_stats(side.model, counted(batches, side.view))
    knn: dict[str, list[float]] = {}
    if labelled:
        train, val = (embed_blocks(side.model, counted(part, side.view)) for part in labelled.batches)
        for feature in train:
            knn[feature] = [
                knn_accuracy(a_ND, labelled.labels[0], b_ND, labelled.labels[1])
                for a_ND, b_ND in zip(train[feature], val[feature], strict=True)
            ]
    return {**side.facts(), **{name: plain(each) for name, each in stats.items()}, "knn": knn}


def relations_kl(student: Any, teacher: Any, blocks: tuple[int, int], views: tuple[Tensor, Tensor]) -> Any:
    """:func:`tinymim.analysis.health.head_kl` at a block of each; with the class token if both have one."""
    heads = num_heads(teacher)
    if student.embed_dim % heads:
        return None
    class_token = has_class_token(student) and has_class_token(teacher)
    s, t = (
        {part: pair_tokens(x_BTD, model, class_token) for part, x_BTD in qkv_at(model, images, block).items()}
        for model, images, block in zip((student, teacher), views, blocks, strict=True)
    )
    return {relation: plain(kl_M) for relation, kl_M in head_kl(s, t, heads, RELATIONS).items()}


def number(value: float) -> float | None:
    """A number that JSON has; None for the others."""
    return value if math.isfinite(value) else None


def plain(x: Tensor) -> Any:
    """A tensor as nested lists of numbers; None where one is not finite."""
    return [plain(row) for row in x] if x.ndim > 1 else [number(value) for value in x.tolist()]
