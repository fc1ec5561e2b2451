"""tinymim_export: checkpoint -> verified ONNX file -> measured latency.

Lazy on purpose: what runs on the target box (bench, report) imports neither torch nor MMSegmentation nor onnx.
"""

import importlib
from typing import Any

_FROM = {
    "export": "convert",
    "ExportResult": "convert",
    "verify": "parity",
    "ParityResult": "parity",
    "bench": "latency",
    "BenchResult": "latency",
    "main": "cli",
}
__all__ = ["BenchResult", "ExportResult", "ParityResult", "bench", "export", "main", "verify"]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"tinymim_export.{_FROM[name]}"), name)
    raise AttributeError(f"module 'tinymim_export' has no attribute {name!r}")
