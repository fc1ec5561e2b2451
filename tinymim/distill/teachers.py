"""The teachers a recipe names: their keys, loading them, and where and how each of them is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymim.compat import is_first_process
from tinymim.distill.recipe_keys import Key, Number
from tinymim.distill.taps import QKV
from tinymim.distill.targets import Relation, Target, parse_target
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import create_model
from tinymim.models.teachers import Teacher, default_target_block, load_teacher, state_sha256, teacher_prefix

TEACHER_KEYS: Mapping[str, Key] = {
    "teacher": Key(None),  # timm/NAME or a checkpoint file
    "teacher_weights": Key(None),  # file for a timm teacher
    "teacher_heads": Key(None),  # for files that do not store the head count
    "targets": Key(["qk+vv"]),  # words of tinymim.distill.targets: WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]
    "target_block": Number(None, least=1, whole=True),  # from 1; None: 18 of 24, else the last
    "relation_heads": Number(None, least=1, whole=True),  # None: the teacher's heads
    "align": Key(None),  # patch sizes that differ: "image" resizes the teacher's photo, "tokens" its tokens
}
OF_AN_ENTRY = (*TEACHER_KEYS, "weight")  # keys of an entry of ``teachers``


def named_teachers(names: str | Sequence[str] | None, files: str | Sequence[str] | None) -> dict[str, Any]:
    """The recipe keys that ``--teacher`` and ``--teacher-weights`` stand for.

    Raises:
        ConfigError: several teachers and another number of files.
    """
    names = [names] if isinstance(names, str) else [*(names or [])]
    files = [files] if isinstance(files, str) else [*(files or [])]
    if len(names) < 2:
        return {"teacher": names[0] if names else None, "teacher_weights": files[0] if files else None}
    if files and len(files) != len(names):
        raise ConfigError(
            f"{len(names)} teachers and {len(files)} files of weights",
            "each teacher has its own",
            'give --teacher-weights one file per teacher, "-" where there is none',
        )
    entries = []
    for name, file in zip(names, files or ["-"] * len(names), strict=True):
        plain, _, weight = name.rpartition("=")
        number = re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) if plain else None
        if plain and not number and not teacher_prefix(name) and not Path(name).is_file():
            raise ConfigError(
                f"the weight {weight!r} of the teacher {plain}",
                "it is no number above 0",
                f"e.g. --teacher {plain}=0.5",
            )
        entry = dict(teacher=plain if number else name, weight=float(weight) if number else 1.0)
        entries.append(entry | ({} if file == "-" else {"teacher_weights": file}))
    return {"teachers": entries}


def each_teacher(recipe: Any) -> list[dict[str, Any]]:
    """The teachers of a recipe: its own keys, or for each entry of ``teachers`` those keys with the entry's over them.

    Raises:
        ConfigError: none, both ways at once, or an entry with a key that is no teacher's.
    """
    common = {key: recipe[key] for key in TEACHER_KEYS}
    if not recipe.teachers:
        if not recipe.teacher:
            raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
        return [common]
    for entry in recipe.teachers:
        if not isinstance(entry, dict) or not entry.get("teacher") or set(entry) - set(OF_AN_ENTRY):
            raise ConfigError(
                f"teachers has the entry {entry!r}",
                f"its keys are {', '.join(OF_AN_ENTRY)}",
                "e.g. teachers=[dict(teacher='timm/NAME'), dict(teacher='FILE', weight=0.5)]",
            )
    return [{**common, "teacher_weights": None, "teacher_heads": None, **entry} for entry in recipe.teachers]


@dataclass(frozen=True)
class Reading:
    """A teacher, and where and how it is read.

    Attributes:
        teacher: The teacher.
        block: What words without a block read, from 1.
        heads: In which the teacher's own relations of that block are grouped; None: not learned by relations, or not
            read there.
    """

    teacher: Teacher
    block: int
    heads: int | None

    def check(self, targets: Sequence[Target]) -> None:
        """Refuse targets that were never trained in this teacher.

        Raises:
            ConfigError: its own relations reached no further.
        """
        trained = self.teacher.trained_depth
        for target in targets:
            if trained and target.teacher_block > trained and not set(target.taps) <= set(QKV):
                raise ConfigError(
                    f"{self.teacher.name} has nothing to teach by {target.parts[0]} of block {target.teacher_block}",
                    "it was itself distilled by relations: of that block its q, k and v alone were trained",
                    f"read block {trained}: --targets {target.parts[0]}@{trained}",
                )

    def describe(self, method: Any, *, asked: bool) -> None:
        """Print which relations are read; ``asked``: the recipe itself names the number of heads."""
        relations = [target for target in method.targets if isinstance(target, Relation)]
        if not relations or not is_first_process():
            return
        whose = "asked for" if asked else "of its own relations" if self.heads else "of its blocks"
        heads = method.relation_heads
        print(
            f"{self.teacher.name}, block {', '.join(str(t.teacher_block) for t in relations)}: relations of {heads} "
            f"heads ({whose}), {method.source.width // heads} channels each, "
            f"student {method.student.embed_dim // heads}"
        )


def load_for_recipe(recipe: Any, wish: Mapping[str, Any], student: Any, *, pretrained: bool) -> Reading:
    """Load a teacher and find out how it is read.

    Args:
        recipe: The recipe.
        wish: One of :func:`each_teacher`.
        student: The student.
        pretrained: False for a dry run: a timm teacher keeps random weights, a file that is not there yet is stood in
            for by a model of the next larger size.

    Raises:
        TinyMIMError: no such teacher, or relations of two blocks with different heads.
    """
    name = wish["teacher"]
    grid = -(-recipe.img_size // student.patch_size) if wish["align"] == "image" else None
    try:
        teacher = load_teacher(
            name,
            img_size=recipe.img_size,
            weights=wish["teacher_weights"],
            num_heads=wish["teacher_heads"],
            pretrained=pretrained,
            grid=grid,
        )
    except CheckpointError:
        if pretrained or teacher_prefix(name):
            raise
        print(f"note: {name} is not there yet; the dry run measures a stand-in of the next larger size")
        larger = {"tinymim_vit_tiny": "tinymim_vit_small"}.get(recipe.student, "tinymim_vit_base")
        stand_in = create_model(larger, img_size=recipe.img_size).eval().requires_grad_(False)
        # as the published chain, which begins with MAE ViT-L, leaves it
        teacher = Teacher(stand_in, larger, (0.5,) * 3, (0.5,) * 3, None, relations=(stand_in.depth, 16))
    teacher.sha256 = teacher.sha256 or state_sha256(teacher.model)
    return Reading(teacher, *_where(wish, teacher, student.depth))


def _where(wish: Mapping[str, Any], teacher: Teacher, student_depth: int) -> tuple[int, int | None]:
    """The block that words without one read, and the heads that the teacher's own relations are grouped in, if read.

    A student of ours is read where and as it learned its relations, unless another block is asked for.

    Raises:
        ConfigError: relations of that block and of another one at once, whose heads are others.
    """
    depth = len(teacher.model.blocks)  # type: ignore[arg-type]
    at, learned = teacher.relations or (default_target_block(depth), None)
    block = wish["target_block"] or at
    words = [wish["targets"]] if isinstance(wish["targets"], str) else wish["targets"]
    targets = [parse_target(word, depth, student_depth, block) for word in words]
    read = {target.teacher_block for target in targets if isinstance(target, Relation)}
    if learned is None or at not in read:
        return block, None
    if len(read) > 1 and not wish["relation_heads"]:
        raise ConfigError(
            f"relations of the blocks {', '.join(map(str, sorted(read)))} of {teacher.name}",
            f"it learned those of block {at} in {learned} heads, which the others do not have",
            f"choose for all of them: --cfg-options relation_heads={learned}",
        )
    return block, learned
