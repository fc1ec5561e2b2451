"""Kept for callers of 0.1: the file to import is :mod:`tinymim_export.precision.sensitivity`."""

from tinymim_export.precision.sensitivity import SensitivityResult, sensitivity

__all__ = ["SensitivityResult", "sensitivity"]
