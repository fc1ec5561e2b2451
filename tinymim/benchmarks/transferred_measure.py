"""The measurements of ``tools/what_was_transferred.py``: a teacher and its students on the same photos.

Legend: B = photos, S = side in pixels, L = blocks, H = heads, N = labelled photos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymim.analysis import attention_stats, cka
from tinymim.analysis.attention_maps import check_maps
from tinymim.analysis.health import LAYERS, OUTLIER_LIMIT, activation_outliers, head_kl
from tinymim.analysis.probes import embed_blocks, knn_accuracy
from tinymim.analysis.sides import Counter, Side, batches_of, number, open_student, plain, read_crops, record
from tinymim.distill import qkv_at
from tinymim.engine.health import HEALTH_PHOTOS, read_probe
from tinymim.errors import ConfigError
from tinymim.models.teachers import default_target_block, load_teacher
from tinymim.models.tokens import has_class_token, num_heads, pair_tokens, patch_size

RELATIONS = ("qk", "vv")


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
        found.record[name] = {**record([path for path, _ in pairs]), "used": len(kept)}
    return found


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
