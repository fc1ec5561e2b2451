"""What is compared, as one word: ``qk+vv``, ``output``, ``qkv@18``, ``attn_pre@12:6=0.5``.

    WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]

    qk+vv, qq+kk+vv, ...                     relations, summed (TinyMIM's tables 7 and 8)
    output, attn_pre, attn_post, ffn_pre     features (table 6); ffn_post is another name of output
    qkv                                      the features q, k and v, one loss each (table 6)
    class_token                              the class token of the block's output (table 5)

Blocks count from 1. Defaults: the teacher's block 18 of 24, else its last; the student's last.
A new kind of target is a subclass of :class:`Target` in :data:`KINDS`.

Legend: B = batch, T = tokens, D = width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tinymim.distill.features import class_token_kl, feature_loss
from tinymim.distill.relations import relation_losses
from tinymim.distill.taps import QKV
from tinymim.errors import ConfigError
from tinymim.models.teachers import default_target_block

Taps = Mapping[str, Tensor]  # name of a tap -> (B, T, D): the class token, if it is compared, then the patches


@dataclass(frozen=True)
class Target:
    """One comparison of a teacher's block with a student's.

    Attributes:
        parts: The parts with a loss each: relations ("qk", ...), taps ("output", "q", ...), or "class_token".
        teacher_block: From 1.
        student_block: From 1.
        weight: Factor of its losses.
    """

    kind: ClassVar[str]
    words: ClassVar[str]  # regular expression of the words that name such a target
    patches: ClassVar[bool] = True  # whether patches are compared

    parts: tuple[str, ...]
    teacher_block: int
    student_block: int
    weight: float = 1.0

    @staticmethod
    def parts_of(word: str) -> tuple[str, ...]:
        """The parts that a word names."""
        return (word,)

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that are read from both models (:mod:`tinymim.distill.taps`)."""
        return self.parts

    def check(self, student_width: int, teacher_width: int, heads: int) -> None:
        """Raise :class:`~tinymim.errors.ConfigError` for widths that cannot be compared."""

    def make_maps(self, student_width: int, teacher_width: int) -> dict[str, nn.Module]:
        """Part -> the layer that maps the student's tokens to the teacher's width, for the parts that need one."""
        return {}

    def losses(
        self, student: Taps, teacher: Taps, maps: Mapping[str, nn.Module], *, heads: int, softmax: bool
    ) -> dict[str, Tensor]:
        """Part -> differentiable scalar.

        Args:
            student: The student's taps.
            teacher: The teacher's taps; tokens are paired one to one.
            maps: The layers of :meth:`make_maps`.
            heads: Relation heads.
            softmax: Whether relations are compared after a softmax.
        """
        raise NotImplementedError


class Relation(Target):
    """Relations among tokens, e.g. Q-K and V-V (equation 9); channels are regrouped, so no map is needed."""

    kind = "relation"
    words = r"[qkv]{2}(?:\+[qkv]{2})*"

    @staticmethod
    def parts_of(word: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word.split("+")))

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(name for name in QKV if name in "".join(self.parts))

    def check(self, student_width: int, teacher_width: int, heads: int) -> None:
        if student_width % heads or teacher_width % heads:
            raise ConfigError(
                f"{heads} relation heads do not divide the widths {student_width} and {teacher_width}",
                "channels of both sides are regrouped into that many heads",
                "choose relation_heads that divides both",
            )

    def losses(
        self, student: Taps, teacher: Taps, maps: Mapping[str, nn.Module], *, heads: int, softmax: bool
    ) -> dict[str, Tensor]:
        return relation_losses(student, teacher, heads, self.parts, softmax)


class Feature(Target):
    """Tokens themselves: smooth L1 of the mapped student against the whitened teacher (equations 7 and 8)."""

    kind = "feature"
    words = "output|attn_pre|attn_post|ffn_pre|ffn_post|qkv"

    @staticmethod
    def parts_of(word: str) -> tuple[str, ...]:
        return QKV if word == "qkv" else ("output" if word == "ffn_post" else word,)

    def make_maps(self, student_width: int, teacher_width: int) -> dict[str, nn.Module]:
        return {part: nn.Linear(student_width, teacher_width) for part in self.parts}

    def losses(
        self, student: Taps, teacher: Taps, maps: Mapping[str, nn.Module], *, heads: int, softmax: bool
    ) -> dict[str, Tensor]:
        return {part: feature_loss(maps[part](student[part]), teacher[part]) for part in self.parts}


class ClassToken(Target):
    """The class token of a block's output, as a distribution over channels (equations 5 and 6)."""

    kind = "class_token"
    words = "class_token"
    patches = False

    @property
    def taps(self) -> tuple[str, ...]:
        return ("output",)

    def make_maps(self, student_width: int, teacher_width: int) -> dict[str, nn.Module]:
        return {} if student_width == teacher_width else {"class_token": nn.Linear(student_width, teacher_width)}

    def losses(
        self, student: Taps, teacher: Taps, maps: Mapping[str, nn.Module], *, heads: int, softmax: bool
    ) -> dict[str, Tensor]:
        s_BD, t_BD = student["output"][:, 0], teacher["output"][:, 0]
        return {"class_token": class_token_kl(maps["class_token"](s_BD) if maps else s_BD, t_BD)}


KINDS: tuple[type[Target], ...] = (Relation, ClassToken, Feature)


def parse_target(word: str, teacher_depth: int, student_depth: int, teacher_block: int | None = None) -> Target:
    """Parse a word into a :class:`Target`.

    Args:
        word: See the top of this file.
        teacher_depth: Blocks of the teacher.
        student_depth: Blocks of the student.
        teacher_block: Default for words that name none; None: 18 of 24, else the last.

    Raises:
        ConfigError: an unknown word, or a block that the model does not have.
    """
    known = "|".join(f"(?P<k{i}>{kind.words})" for i, kind in enumerate(KINDS))
    match = re.fullmatch(
        rf"(?:{known})(?:@(?P<teacher>\d+))?(?::(?P<student>\d+))?(?:=(?P<weight>\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+))?",
        word,
    )
    if match is None:
        single = [each for kind in KINDS[1:] for each in kind.words.split("|")]
        raise ConfigError(
            f"target {word!r} is not understood",
            f"it is a sum of relations like qk+vv, or one of {', '.join(single)}; then @TEACHER_BLOCK, :STUDENT_BLOCK, "
            "=WEIGHT",
            "e.g. qk+vv, output@18, qkv@12:6=0.5",
        )
    default = teacher_block or default_target_block(teacher_depth)
    blocks = int(match["teacher"] or default), int(match["student"] or student_depth)
    for side, block, depth in zip(("teacher", "student"), blocks, (teacher_depth, student_depth), strict=True):
        if not 1 <= block <= depth:
            raise ConfigError(
                f"target block {block} does not exist in the {side}",
                f"it has {depth} blocks, counted from 1",
                f"choose 1 to {depth}",
            )
    kind, what = next((kind, match[f"k{i}"]) for i, kind in enumerate(KINDS) if match[f"k{i}"] is not None)
    return kind(kind.parts_of(what), *blocks, float(match["weight"] or 1))


def read_from(targets: Any, side: str) -> dict[int, tuple[str, ...]]:
    """The taps that targets read from one model: block -> taps.

    Args:
        targets: :class:`Target` objects.
        side: "student" or "teacher".
    """
    wanted: dict[int, tuple[str, ...]] = {}
    for target in targets:
        block = getattr(target, f"{side}_block")
        wanted[block] = tuple(dict.fromkeys((*wanted.get(block, ()), *target.taps)))
    return wanted
