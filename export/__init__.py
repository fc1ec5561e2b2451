"""tinymim_export: checkpoint -> verified ONNX file -> measured latency.

The floors: ``graph`` (torch, onnx), ``precision`` (onnx), ``runtime``, ``bench``, ``tune``, ``report``, ``web``.
Lazy on purpose: what runs on the target box imports neither torch nor MMSegmentation nor onnx.
"""

from tinymim.lazy import lazy

_PLACES = {
    "export": "graph.convert",
    "ExportResult": "graph.convert",
    "verify": "graph.parity",
    "ParityResult": "comparison",
    "QuantizeResult": "precision.quantize",
    "SensitivityResult": "precision.sensitivity",
    "bench": "bench.latency",
    "BenchResult": "bench.latency",
    "evaluate": "runtime.miou",
    "EvalResult": "runtime.miou",
    "Predictor": "runtime.predictor",
    "TuneResult": "tune.result",
    "build_report": "report.lineage_report",
    "build_web": "web.build",
    "main": "cli",
    **dict.fromkeys(("graph", "precision", "report", "runtime", "tune", "web"), ""),  # floors
    **dict.fromkeys(("masks", "photos", "predict", "quantize", "sensitivity"), ""),  # modules of 0.1
}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
