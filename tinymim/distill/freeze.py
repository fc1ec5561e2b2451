"""What a distillation never trains: the parts of a student behind the deepest tap, and its fixed positions."""

from typing import Any

from tinymim.distill.taps import TAPS
from tinymim.models.vit import ViT


def freeze_unreached(student: ViT, taps: dict[int, tuple[str, ...]], *, pixels: bool) -> None:
    """Parameters that no loss depends on need no gradient (and DDP no search for them); all others do.

    Args:
        student: The student.
        taps: Block (from 1) -> what is read there.
        pixels: MAE's loss reads the last block too, through the final norm: everything is reached.
    """
    student.requires_grad_(True)
    student.pos_embed.requires_grad_(False)
    student.conv1x1.requires_grad_(False)
    if pixels:
        return
    deepest = max(taps)
    reached = max(TAPS.index(name) for name in taps[deepest])
    last: Any = student.blocks[deepest - 1]
    unused: list[Any] = [student.norm, *student.blocks[deepest:]]
    if reached < TAPS.index("attn_pre"):
        unused += [last.attn.proj, last.ls1]
        if last.attn.relative_position_bias_table is not None:
            unused.append(last.attn.relative_position_bias_table)
    if reached < TAPS.index("ffn_pre"):
        unused += [last.norm2, last.mlp, last.ls2]
    for part in unused:
        part.requires_grad_(False)
