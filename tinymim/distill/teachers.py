"""The teachers of a recipe: their keys, loading them, and the block and heads at which each is read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.compat import is_first_process
from tinymim.distill.recipe_keys import Key, Kind, Number
from tinymim.distill.taps import QKV
from tinymim.distill.targets import Relation, Target, parse_target
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import create_model
from tinymim.models.backbone import Backbone
from tinymim.models.teachers import Teacher, default_target_block, load_teacher, state_sha256, teacher_prefix
from tinymim.progress import say

TEACHER_KEYS: Mapping[str, Key] = {
    "teacher": Kind(),  # timm/NAME or a checkpoint file
    "teacher_weights": Kind(example="FILE"),  # weights file for a timm teacher
    "teacher_heads": Number(None, least=1, whole=True),  # for files that do not store the head count
    # words of tinymim.distill.targets: WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]
    "targets": Kind(["qk+vv"], types=(str, list, tuple), items=str, words="a list of texts", example="[qk+vv]"),
    "target_block": Number(None, least=1, whole=True),  # from 1; None: 18 of 24, else the last
    "relation_heads": Number(None, least=1, whole=True),  # None: the teacher's heads
    "align": Key(None),  # for different patch sizes: "image" resizes the teacher's photo, "tokens" its tokens
}
ENTRY_KEYS = (*TEACHER_KEYS, "weight")  # keys of an entry of ``teachers``


Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def named_teachers(names: Names, files: Names) -> dict[str, Any]:
    """The recipe keys that ``--teacher`` and ``--teacher-weights`` set.

    Raises:
        ConfigError: several teachers and a different number of files, or a weight that is not a number.
    """
    names, files = (
        [os.fspath(each) for each in ([given] if isinstance(given, str | os.PathLike) else given or [])]
        for given in (names, files)
    )
    if len(names) < 2:
        return {"teacher": names[0] if names else None, "teacher_weights": files[0] if files else None}
    if files and len(files) != len(names):
        raise ConfigError(
            f"{len(names)} teachers and {len(files)} files of weights",
            "each teacher needs its own file",
            'give --teacher-weights one file per teacher, "-" for none',
        )
    entries = []
    for name, file in zip(names, files or ["-"] * len(names), strict=True):
        plain, _, weight = name.rpartition("=")
        number = re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) if plain else None
        if plain and not number and not teacher_prefix(name) and not Path(name).is_file():
            raise ConfigError(
                f"the weight {weight!r} of the teacher {plain}",
                "it is not a number above 0",
                f"e.g. --teacher {plain}=0.5",
            )
        entry = dict(teacher=plain if number else name, weight=float(weight) if number else 1.0)
        entries.append(entry | ({} if file == "-" else {"teacher_weights": file}))
    return {"teachers": entries}


def each_teacher(recipe: Any) -> list[dict[str, Any]]:
    """The keys of each teacher of a recipe: the recipe's own, overridden by those of an entry of ``teachers``.

    Raises:
        ConfigError: no teacher, or an entry with an unknown key.
    """
    common = {key: recipe[key] for key in TEACHER_KEYS}
    if not recipe.teachers:
        if not recipe.teacher:
            raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
        return [common]
    for entry in recipe.teachers:
        if not isinstance(entry, dict) or not entry.get("teacher") or set(entry) - set(ENTRY_KEYS):
            raise ConfigError(
                f"teachers has the entry {entry!r}",
                f"the keys of an entry are {', '.join(ENTRY_KEYS)}",
                "e.g. teachers=[dict(teacher='timm/NAME'), dict(teacher='FILE', weight=0.5)]",
            )
    return [{**common, "teacher_weights": None, "teacher_heads": None, **entry} for entry in recipe.teachers]


@dataclass(frozen=True)
class Reading:
    """A teacher, and the block and heads at which it is read.

    Attributes:
        teacher: The teacher.
        block: Default block of target words, from 1.
        heads: Heads that the teacher's own learned relations of that block are grouped into; None: it learned none, or
            they are not read.
    """

    teacher: Teacher
    block: int
    heads: int | None

    def check(self, targets: Sequence[Target]) -> None:
        """Refuse targets that were never trained in this teacher.

        Raises:
            ConfigError: the teacher was itself distilled by relations, and a target is read after its trained depth.
        """
        trained = self.teacher.trained_depth
        for target in targets:
            if trained and target.teacher_block > trained and not set(target.taps) <= set(QKV):
                raise ConfigError(
                    f"{target.parts[0]} of block {target.teacher_block} of {self.teacher.name} was never trained",
                    "the teacher was itself distilled by relations: of that block, only q, k and v were trained",
                    f"read block {trained}: --targets {target.parts[0]}@{trained}",
                )

    def describe(self, method: Any, *, heads_from_recipe: bool) -> None:
        """Print which relations are read, on the first process.

        Args:
            method: The method that reads this teacher.
            heads_from_recipe: Whether the recipe sets the number of relation heads.
        """
        relations = [target for target in method.targets if isinstance(target, Relation)]
        if not relations or not is_first_process():
            return
        origin = "from the recipe" if heads_from_recipe else "of its own relations" if self.heads else "of its blocks"
        heads = method.relation_heads
        say(
            f"{self.teacher.name}, block {', '.join(str(t.teacher_block) for t in relations)}: relations of {heads} "
            f"heads ({origin}), {method.source.width // heads} channels each, "
            f"student {method.student.embed_dim // heads}"
        )


def load_for_recipe(recipe: Any, entry: Mapping[str, Any], student: Any, *, pretrained: bool) -> Reading:
    """Load a teacher and decide how it is read; arguments and errors as :func:`load_recipe_teacher`, and:

    Raises:
        ConfigError: relations of two blocks with different heads.
    """
    teacher = load_recipe_teacher(recipe, entry, student, pretrained=pretrained)
    return Reading(teacher, *_block_and_heads(entry, teacher, student.depth))


def load_recipe_teacher(recipe: Any, entry: Mapping[str, Any], student: Any, *, pretrained: bool) -> Teacher:
    """Load a teacher.

    Args:
        recipe: The recipe.
        entry: The teacher's keys, one item of :func:`each_teacher`.
        student: The student.
        pretrained: False for a dry run: a timm teacher keeps random weights, and a model of the next larger size
            stands in for a file that does not exist yet.

    Raises:
        TinyMIMError: no such teacher.
    """
    name = entry["teacher"]
    grid = -(-recipe.img_size // student.patch_size) if entry["align"] == "image" else None
    try:
        teacher = load_teacher(
            name,
            img_size=recipe.img_size,
            weights=entry["teacher_weights"],
            num_heads=entry["teacher_heads"],
            pretrained=pretrained,
            grid=grid,
        )
    except CheckpointError:
        if pretrained or teacher_prefix(name):
            raise
        say(f"note: {name} does not exist yet; the dry run measures a stand-in of the next larger size")
        larger = {"tinymim_vit_tiny": "tinymim_vit_small"}.get(recipe.student, "tinymim_vit_base")
        larger = larger if len(student.stage_info) == 1 else recipe.student  # a hierarchical one in timm's own width
        stand_in = create_model(larger, img_size=recipe.img_size).eval().requires_grad_(False)
        # as the published chain, which begins with MAE ViT-L, would write it
        teacher = Teacher(stand_in, larger, (0.5,) * 3, (0.5,) * 3, None, relations=(stand_in.depth, 16))
    teacher.sha256 = teacher.sha256 or state_sha256(teacher.model)
    return teacher


def _block_and_heads(entry: Mapping[str, Any], teacher: Teacher, student_depth: int) -> tuple[int, int | None]:
    """The default block of target words, and the heads of the teacher's own learned relations if they are read.

    A teacher that was distilled by relations is read at the block and with the heads it learned, unless the entry names
    another block.

    Raises:
        ConfigError: relations are read from that block and from others with a different number of heads.
    """
    model: Any = teacher.model
    depth = model.depth if isinstance(model, Backbone) else len(model.blocks)
    at, learned = teacher.relations or (default_target_block(depth), None)
    block = entry["target_block"] or at
    words = [entry["targets"]] if isinstance(entry["targets"], str) else entry["targets"]
    targets = [parse_target(word, depth, student_depth, block) for word in words]
    read = {target.teacher_block for target in targets if isinstance(target, Relation)}
    if learned is None or at not in read:
        return block, None
    if len(read) > 1 and not entry["relation_heads"]:
        raise ConfigError(
            f"relations of the blocks {', '.join(map(str, sorted(read)))} of {teacher.name}",
            f"it learned those of block {at} with {learned} heads, which the others do not have",
            f"choose one number for all of them: --cfg-options relation_heads={learned}",
        )
    return block, learned
