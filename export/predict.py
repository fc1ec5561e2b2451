"""Kept for callers of 0.1: the files to import are :mod:`tinymim_export.runtime.predictor` and ``.predict``."""

from tinymim_export.runtime.predict import PredictResult, predict
from tinymim_export.runtime.predictor import Predictor, read_photo

__all__ = ["PredictResult", "Predictor", "predict", "read_photo"]
