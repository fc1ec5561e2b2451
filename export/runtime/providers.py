"""What a provider is: the part of a runtime that computes on one kind of device. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Provider:
    """Where a runtime computes.

    Attributes:
        name: Word of ``--provider``.
        title: What results and reports call it, e.g. "CUDAExecutionProvider".
        target: Word of ``tinymim-export --runtimes``.
        device: Where inputs and outputs are held while it is timed, "cpu" or "cuda".
        precisions: Precisions that ``--tune`` tries here, in addition to those that name this provider as their target.
    """

    name: str
    title: str
    target: str
    device: str = "cpu"
    precisions: tuple[str, ...] = ()
