"""Recipe -> method: a student, its teachers, and what is compared."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from tinymim.compat import is_first_process
from tinymim.distill import SeveralTeachers, TinyMIM
from tinymim.distill.taps import QKV
from tinymim.distill.targets import parse_target
from tinymim.errors import CheckpointError, ConfigError
from tinymim.models import ViT, create_model
from tinymim.models.mae import MAE
from tinymim.models.teachers import Teacher, default_target_block, load_teacher, state_sha256

TEACHER_KEYS = (
    "teacher",
    "teacher_weights",
    "teacher_heads",
    "targets",
    "target_block",
    "relation_heads",
    "align",
    "weight",
)


def build_method(config: Config, *, pretrained: bool = True) -> tuple[TinyMIM | SeveralTeachers | MAE, list[Teacher]]:
    """The method of a recipe, with its teachers.

    Raises:
        TinyMIMError: models that do not fit each other, or a teacher without weights.
    """
    arguments = dict(config.student_args)
    if config.drop_path and "drop_path_rate" not in arguments:
        depth = int(arguments.get("depth", 12))
        arguments["drop_path_rate"] = [float(config.drop_path)] * (depth - 1) + [0.0]
    encoder = create_model(config.student, img_size=config.img_size, **arguments)
    encoder.set_grad_checkpointing(bool(config.grad_checkpointing))
    if config.method == "mae":
        if encoder.num_prefix_tokens != 1 or config.img_size % encoder.patch_size:
            raise ConfigError(
                f"{config.student} at {config.img_size} pixels cannot be masked",
                "MAE needs a class token only and sizes that are whole patches",
                f"use a plain model and a multiple of {encoder.patch_size}",
            )
        d = config.decoder
        return MAE(
            encoder,
            decoder_dim=d["dim"],
            decoder_depth=d["depth"],
            decoder_heads=d["heads"],
            mask_ratio=config.mask_ratio,
            norm_pix=config.norm_pix,
        ), []
    wishes = each_teacher(config)
    pairs = [_with_teacher(config, wish, encoder, pretrained, first=not i) for i, wish in enumerate(wishes)]
    methods, teachers = [method for method, _ in pairs], [teacher for _, teacher in pairs]
    if len(methods) == 1:
        return methods[0], teachers
    return SeveralTeachers(methods, [wish.get("weight", 1.0) for wish in wishes]), teachers


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
            'give --teacher-weights one file a teacher, "-" where there is none',
        )
    entries = []
    for name, file in zip(names, files or ["-"] * len(names), strict=True):
        plain, _, weight = name.rpartition("=")
        number = re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) if plain else None
        if plain and not number and not name.startswith("timm/") and not Path(name).is_file():
            raise ConfigError(
                f"the weight {weight!r} of the teacher {plain}",
                "it is no number above 0",
                f"e.g. --teacher {plain}=0.5",
            )
        entry = dict(teacher=plain if number else name, weight=float(weight) if number else 1.0)
        entries.append(entry | ({} if file == "-" else {"teacher_weights": file}))
    return {"teachers": entries}


def each_teacher(config: Config) -> list[dict[str, Any]]:
    """The teachers of a recipe: its own keys, or for each entry of ``teachers`` those keys with the entry's over them.

    Raises:
        ConfigError: none, both ways at once, or an entry with a key that is no teacher's.
    """
    common = {key: config[key] for key in TEACHER_KEYS if key != "weight"}
    if not config.teachers:
        if not config.teacher:
            raise ConfigError("no teacher", "the recipe names none", "add --teacher timm/NAME or --teacher FILE")
        return [common]
    for entry in config.teachers:
        if not isinstance(entry, dict) or not entry.get("teacher") or set(entry) - set(TEACHER_KEYS):
            raise ConfigError(
                f"teachers has the entry {entry!r}",
                f"its keys are {', '.join(TEACHER_KEYS)}",
                "e.g. teachers=[dict(teacher='timm/NAME'), dict(teacher='FILE', weight=0.5)]",
            )
    return [{**common, "teacher_weights": None, "teacher_heads": None, **entry} for entry in config.teachers]


def _with_teacher(
    config: Config, wish: dict[str, Any], encoder: ViT, pretrained: bool, first: bool
) -> tuple[TinyMIM, Teacher]:
    """One teacher and the method around it."""
    name = wish["teacher"]
    grid = -(-config.img_size // encoder.patch_size) if wish["align"] == "image" else None
    try:
        teacher = load_teacher(
            name,
            img_size=config.img_size,
            weights=wish["teacher_weights"],
            num_heads=wish["teacher_heads"],
            pretrained=pretrained,
            grid=grid,
        )
    except CheckpointError:
        if pretrained or name.startswith("timm/"):
            raise
        print(f"note: {name} is not there yet; the dry run measures a stand-in of the next larger size")
        larger = {"tinymim_vit_tiny": "tinymim_vit_small"}.get(config.student, "tinymim_vit_base")
        stand_in = create_model(larger, img_size=config.img_size).eval().requires_grad_(False)
        # as the published chain, which begins with MAE ViT-L, leaves it
        teacher = Teacher(stand_in, larger, (0.5,) * 3, (0.5,) * 3, None, relations=(stand_in.depth, 16))
    teacher.sha256 = teacher.sha256 or state_sha256(teacher.model)
    d = config.decoder
    decoder = dict(
        decoder_dim=d["dim"],
        decoder_depth=d["depth"],
        decoder_heads=d["heads"],
        norm_pix=config.norm_pix,
        weight=config.reconstruct,
    )
    block, learned = _reading(wish, teacher, encoder.depth)
    method = TinyMIM(
        encoder,
        teacher.model,
        targets=wish["targets"],
        target_block=block,
        relation_heads=wish["relation_heads"] or learned,
        softmax=config.softmax,
        class_token=config.class_token,
        mask=config.mask,
        mask_ratio=config.mask_ratio,
        reconstruct=decoder if config.reconstruct and first else None,
        teacher_drop_path=config.teacher_drop_path,
        align=wish["align"],
    )
    for target in method.targets:
        if teacher.trained_depth and target.teacher_block > teacher.trained_depth and not set(target.taps) <= set(QKV):
            raise ConfigError(
                f"{teacher.name} has nothing to teach by {target.parts[0]} of block {target.teacher_block}",
                "it was itself distilled by relations: of that block its q, k and v alone were trained",
                f"read block {teacher.trained_depth}: --targets {target.parts[0]}@{teacher.trained_depth}",
            )
    relations = [target for target in method.targets if target.kind == "relation"]
    if relations and is_first_process():
        whose = (
            "of its own relations"
            if learned and not wish["relation_heads"]
            else ("asked for" if wish["relation_heads"] else "of its blocks")
        )
        print(
            f"{teacher.name}, block {', '.join(str(t.teacher_block) for t in relations)}: relations of "
            f"{method.relation_heads} heads ({whose}), {int(teacher.model.embed_dim) // method.relation_heads} "  # type: ignore[arg-type]
            f"channels each, student {encoder.embed_dim // method.relation_heads}"
        )
    return method, teacher


def _reading(wish: dict[str, Any], teacher: Teacher, student_depth: int) -> tuple[int, int | None]:
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
    read = {target.teacher_block for target in targets if target.kind == "relation"}
    if learned is None or at not in read:
        return block, None
    if len(read) > 1 and not wish["relation_heads"]:
        raise ConfigError(
            f"relations of the blocks {', '.join(map(str, sorted(read)))} of {teacher.name}",
            f"it learned those of block {at} in {learned} heads, which the others do not have",
            f"choose for all of them: --cfg-options relation_heads={learned}",
        )
    return block, learned


def learned_relations(network: nn.Module) -> tuple[int, int] | None:
    """Student block and heads of the relations a student learned at its deepest block; it teaches with the same.

    None for a student of several teachers that do not agree.
    """
    methods: list[Any] = [*network.methods] if isinstance(network, SeveralTeachers) else [network]
    found = set()
    for method in methods:
        targets = method.targets if isinstance(method, TinyMIM) else []
        if blocks := [target.student_block for target in targets if target.kind == "relation"]:
            found.add((max(blocks), method.relation_heads))
    return found.pop() if len(found) == 1 else None
