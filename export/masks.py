"""Kept for callers of 0.1: the file to import is :mod:`tinymim_export.runtime.predict`."""

from tinymim_export.runtime.predict import PredictResult, _jobs, predict

__all__ = ["PredictResult", "_jobs", "predict"]
