"""What a distillation never trains: the parts of a student behind the deepest tap, and its fixed positions."""

from typing import Any

from tinymim.models.backbone import TAPS


def freeze_unreached(student: Any, taps: dict[int, tuple[str, ...]], *, pixels: bool) -> None:
    """Parameters that no loss depends on need no gradient (and DDP no search for them); all others do.

    Args:
        student: A backbone that says ``fixed_parts`` and ``parts_behind``.
        taps: Block (from 1) -> what is read there.
        pixels: MAE's loss reads the last block too, through the final norm: everything is reached.
    """
    student.requires_grad_(True)
    unused: list[Any] = student.fixed_parts()
    if not pixels:
        deepest = max(taps)
        unused += student.parts_behind(deepest - 1, max(taps[deepest], key=TAPS.index))
    for part in unused:
        part.requires_grad_(False)
