"""What runs where the customer is: contract, engines, prediction, mIoU. numpy, Pillow and onnxruntime only."""

from tinymim.lazy import lazy

_PLACES = {
    "Engine": "engines",
    "OnnxNetwork": "tracker",
    "Predictor": "predictor",
    "evaluate": "miou",
    "open_engine": "engines",
}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
