"""What distillation never trains: the parts of a student after the deepest tap, and its fixed positions."""

from typing import Any

from tinymim.models.backbone import TAPS


def freeze_unreached(student: Any, taps: dict[int, tuple[str, ...]], *, pixels: bool) -> None:
    """Train only parameters that a loss depends on, so that DDP need not search for unused ones.

    Args:
        student: A backbone with ``fixed_parts`` and ``parts_after``; changed in place.
        taps: Block (from 1) -> names of the taps that are read.
        pixels: Whether MAE's loss is used: it reads the last block through the final norm, so it reaches everything.
    """
    student.requires_grad_(True)
    unused: list[Any] = student.fixed_parts()
    if not pixels:
        deepest = max(taps)
        unused += student.parts_after(deepest - 1, max(taps[deepest], key=TAPS.index))
    for part in unused:
        part.requires_grad_(False)
