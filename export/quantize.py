"""Kept for callers of 0.1: the file to import is :mod:`tinymim_export.precision.quantize`."""

from tinymim_export.precision.quantize import QuantizeResult, quantize

__all__ = ["QuantizeResult", "quantize"]
