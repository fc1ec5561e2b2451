"""tinymim_export: checkpoint -> verified ONNX file -> measured latency.

Lazy on purpose: what runs on the target box (bench, report) imports neither torch nor MMSegmentation nor onnx.
"""

import importlib
from typing import Any

_FROM = {  # functions named like their module (quantize, sensitivity, tune) are imported from it
    "export": "convert",
    "ExportResult": "convert",
    "verify": "parity",
    "ParityResult": "parity",
    "QuantizeResult": "quantize",
    "SensitivityResult": "sensitivity",
    "bench": "latency",
    "BenchResult": "latency",
    "evaluate": "miou",
    "EvalResult": "miou",
    "Predictor": "predict",
    "TuneResult": "tune",
    "build_report": "lineage",
    "build_web": "web",
    "main": "cli",
}
__all__ = sorted(_FROM)


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"tinymim_export.{_FROM[name]}"), name)
    raise AttributeError(f"module 'tinymim_export' has no attribute {name!r}")
