"""What is compared, in one word: ``qk+vv``, ``output``, ``qkv@18``, ``attn_pre@12:6=0.5``.

    WHAT[@TEACHER_BLOCK][:STUDENT_BLOCK][=WEIGHT]

    qk+vv, qq+kk+vv, ...                     relations, summed (TinyMIM's tables 7 and 8)
    output, attn_pre, attn_post, ffn_pre     features (table 6); ffn_post is another name of output
    qkv                                      the features q, k and v, a loss each (table 6)
    class_token                              the class token of the block's output (table 5)

Blocks count from 1. Without them: the teacher's block 18 of 24, else its last; the student's last.
"""

import re
from dataclasses import dataclass

from tinymim.distill.taps import QKV
from tinymim.errors import ConfigError
from tinymim.models.teachers import default_target_block

FEATURES = ("output", "attn_pre", "attn_post", "ffn_pre")
WORDS = ("class_token", *FEATURES, "ffn_post", "qkv")
RELATION = r"[qkv]{2}(?:\+[qkv]{2})*"


@dataclass(frozen=True)
class Target:
    """One comparison.

    Attributes:
        kind: "relation", "feature" or "class_token".
        parts: Relations ("qk", ...) or taps ("output"; "q", "k", "v").
        teacher_block: From 1.
        student_block: From 1.
        weight: Factor of its losses.
    """

    kind: str
    parts: tuple[str, ...]
    teacher_block: int
    student_block: int
    weight: float = 1.0

    @property
    def taps(self) -> tuple[str, ...]:
        """What has to be read on both sides."""
        if self.kind == "relation":
            return tuple(name for name in QKV if name in "".join(self.parts))
        return ("output",) if self.kind == "class_token" else self.parts


def parse_target(word: str, teacher_depth: int, student_depth: int, teacher_block: int | None = None) -> Target:
    """A word as a :class:`Target`.

    Args:
        word: See the head of this file.
        teacher_depth: Blocks of the teacher.
        student_depth: Blocks of the student.
        teacher_block: Where the word names none; None: 18 of 24, else the last.

    Raises:
        ConfigError: not such a word, or a block the model does not have.
    """
    match = re.fullmatch(
        rf"({RELATION}|{'|'.join(WORDS)})(?:@(\d+))?(?::(\d+))?(?:=(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+))?", word
    )
    if match is None:
        raise ConfigError(
            f"target {word!r} is not understood",
            f"it is a sum of relations like qk+vv, or one of {', '.join(WORDS)}; then @TEACHER_BLOCK, :STUDENT_BLOCK, "
            "=WEIGHT",
            "e.g. qk+vv, output@18, qkv@12:6=0.5",
        )
    what, at_teacher, at_student, weight = match.groups()
    default = teacher_block or default_target_block(teacher_depth)
    blocks = int(at_teacher or default), int(at_student or student_depth)
    for side, block, depth in zip(("teacher", "student"), blocks, (teacher_depth, student_depth), strict=True):
        if not 1 <= block <= depth:
            raise ConfigError(
                f"target block {block} leaves the {side}",
                f"it has {depth} blocks, counted from 1",
                f"choose 1 to {depth}",
            )
    if re.fullmatch(RELATION, what):
        kind, parts = "relation", tuple(dict.fromkeys(what.split("+")))
    elif what == "class_token":
        kind, parts = "class_token", ("class_token",)
    else:
        kind, parts = "feature", QKV if what == "qkv" else ("output" if what == "ffn_post" else what,)
    return Target(kind, parts, *blocks, float(weight or 1))
