"""Checks that student, teacher and options fit together; the errors say what to type instead."""

from collections.abc import Sequence
from typing import Any

from tinymim.distill.taps import TAPPABLE
from tinymim.errors import ConfigError
from tinymim.models.backbone import TapByTap
from tinymim.models.tokens import has_class_token, patch_grid

MASKS = (None, "student", "teacher", "both")
ALIGNS = (None, "image", "tokens")


def check_student(student: Any) -> None:
    """Refuse a student that cannot be read.

    Raises:
        ConfigError: it is not a :class:`~tinymim.models.backbone.TapByTap`.
    """
    if not isinstance(student, TapByTap):
        raise ConfigError(
            f"the student is a {type(student).__name__}",
            "a student is masked and read inside its blocks, which only plain transformers offer",
            'use a plain model, e.g. tinymim.create_model("tinymim_vit_tiny"); hiera_* and swin_* have recipes of '
            "their own: mae_hiera_tiny, simmim_swin_tiny",
        )


def check_teacher(teacher: Any) -> None:
    """Refuse a teacher that cannot be read.

    Raises:
        ConfigError: it is none of :data:`~tinymim.distill.taps.TAPPABLE`.
    """
    if not isinstance(teacher, TAPPABLE):
        raise ConfigError(
            f"the teacher is a {type(teacher).__name__}",
            f"distillation can read {', '.join(kind.__name__ for kind in TAPPABLE)} (tinymim's ViT and timm's)",
            "use one of these as teacher; hiera_* and swin_* teach students of their own family: "
            "--recipe hiera_tiny_from_hiera_base, d2simmim_swin_tiny_from_swin_small",
        )


def check_options(
    method: Any, student: Any, teacher: Any | None, class_token: bool | None, reconstruct: dict[str, Any] | None
) -> None:
    """Refuse options that do not fit together.

    Args:
        method: The method, with its targets and options.
        student: The student.
        teacher: The live teacher; None if the targets come from elsewhere.
        class_token: The method's argument of this name.
        reconstruct: The method's argument of this name.

    Raises:
        ConfigError: an unknown word, a share out of range, a part that a model does not have, or patch grids that
            cannot be paired.
    """
    for name, value, known in (("mask", method.mask, MASKS), ("align", method.align, ALIGNS)):
        if value not in known:
            words = ", ".join(map(repr, known))
            raise ConfigError(
                f"{name}={value!r} is unknown", f"it must be one of {words}", f"set {name} to one of these"
            )
    if method.mask is not None and not 0 < method.mask_ratio < 1:
        raise ConfigError(f"mask_ratio={method.mask_ratio}", "it must be between 0 and 1", "e.g. 0.75")
    if reconstruct is not None and method.mask not in ("student", "both"):
        raise ConfigError("reconstruct needs a masked student", "it predicts masked pixels", "add mask='student'")
    if reconstruct is not None:
        check_masked_student(student)
    for target in method.targets:
        target.check(student.embed_dim, method.source.width, method.relation_heads)
    if teacher is not None:
        check_grids(student, teacher, method.align)
        if method.align == "tokens" and method.mask in ("teacher", "both"):
            raise ConfigError(
                "align='tokens' does not work with a masked teacher",
                "the masked tokens are missing and cannot be resampled",
                "use align='image'",
            )
    needed = class_token or any(not target.patches for target in method.targets)
    for side, there in (("student", has_class_token(student)), ("teacher", method.source.class_token)):
        if needed and not there:
            raise ConfigError(
                f"the {side} has no class token", "the targets or class_token need one", "compare patches only"
            )


def check_masked_student(student: Any) -> None:
    """Refuse an encoder that MAE's decoder does not fit.

    Raises:
        ConfigError: other prefix tokens than one class token, positions that are added to every pair of tokens, or a
            size that is not a whole number of patches.
    """
    ragged = any(side % student.patch_size for side in student.img_size)
    if student.num_prefix_tokens != 1 or ragged or not student.maskable:
        raise ConfigError(
            f"a student with {student.num_prefix_tokens} prefix tokens at {student.img_size[0]} pixels cannot be masked"
            + ("" if student.maskable else " (its attention uses the relative position of every pair of tokens)"),
            "MAE needs a class token as the only prefix token, absolute positions, and a size of whole patches",
            f"use a plain model and a multiple of {student.patch_size} pixels",
        )


def check_grids(student: Any, teacher: Any, align: str | None) -> None:
    """Refuse patch grids that cannot be paired one to one.

    Raises:
        ConfigError: see the message.
    """
    probe = (224, 224)
    grids = patch_grid(student, probe), patch_grid(teacher, probe)
    if grids[0] != grids[1] and align is None:
        raise ConfigError(
            f"student and teacher split a {probe[0]}-pixel photo into {grids[0]} and {grids[1]} patches",
            "tokens are paired one to one",
            f"choose a teacher with patch size {student.patch_size}, or align='image' (the teacher's photo is "
            "resized until its grid is the student's) or align='tokens' (its tokens are resampled)",
        )
    ragged = any(side % student.patch_size for side in student.img_size)
    if align is None and ragged and not isinstance(teacher, TapByTap):
        raise ConfigError(
            f"{student.img_size[0]} pixels are not a multiple of the patch size {student.patch_size}",
            "our student pads such photos, timm's teachers do not",
            f"use a multiple of {student.patch_size} pixels, or align='image' (the teacher's photo is stretched)",
        )


def pair_blocks(
    student_blocks: Sequence[int] | None, teacher_blocks: Sequence[int] | None, depths: tuple[int, int]
) -> list[tuple[int, int]]:
    """The blocks that are compared, (student, teacher).

    Args:
        student_blocks: From 1; None: the last.
        teacher_blocks: The same, as many.
        depths: Of both.

    Raises:
        ConfigError: a block that does not exist, or lists of different length.
    """
    own, taught = (
        [depth] if blocks is None else list(blocks)
        for blocks, depth in zip((student_blocks, teacher_blocks), depths, strict=True)
    )
    if len(own) != len(taught) or not own:
        raise ConfigError(
            f"student_blocks={list(own)} and teacher_blocks={list(taught)}",
            "blocks are compared in pairs",
            "give both lists the same length, at least one",
        )
    for side, blocks, depth in zip(("student", "teacher"), (own, taught), depths, strict=True):
        wrong = [block for block in blocks if not 1 <= block <= depth]
        if wrong:
            raise ConfigError(
                f"block {wrong[0]} does not exist in the {side}",
                f"its blocks with attention are 1 to {depth}",
                f"choose {side}_blocks from 1 to {depth}",
            )
    return list(zip(own, taught, strict=True))


def check_heads(heads: Sequence[tuple[int, int]], head_map: bool) -> None:
    """Refuse logits of different numbers of heads (student, teacher) that are to be compared without a map.

    Raises:
        ConfigError: see above.
    """
    if wrong := [pair for pair in heads if pair[0] != pair[1] and not head_map]:
        raise ConfigError(
            f"head_map=False with {wrong[0][0]} heads in the student and {wrong[0][1]} in the teacher",
            "their logits cannot be compared one by one",
            "leave head_map on, or give the student the teacher's heads: student_args.num_heads",
        )


def check_states(states: Sequence[Any], depths: tuple[int, int]) -> None:
    """Refuse hidden states that do not exist.

    Args:
        states: Pairs (student, teacher), from 0.
        depths: Of both.

    Raises:
        ConfigError: see the message.
    """
    for pair in states:
        whole = len(pair) == 2 and all(type(state) is int for state in pair)
        if not whole or not all(0 <= state <= depth for state, depth in zip(pair, depths, strict=True)):
            raise ConfigError(
                f"hidden={list(states)}: {pair} does not exist",
                f"the student has states 0 to {depths[0]}, the teacher 0 to {depths[1]}",
                "e.g. hidden=[12] for both, or hidden=[[4,12]] for a pair (student, teacher)",
            )
