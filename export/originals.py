"""Kept for callers of 0.1: the file to import is :mod:`tinymim_export.graph.contract`."""

from typing import Any

from tinymim_export.graph.contract import Preparation, contract


def _contract(mean: Any, std: Any, patch: int) -> dict[str, Any]:
    """mean and std (RGB, in the units of the pixels; None: no normalisation) as a file's metadata."""
    found = Preparation(order="RGB")
    if mean is not None and std is not None:
        found.normalise(mean, std)
    return contract(found, patch)
