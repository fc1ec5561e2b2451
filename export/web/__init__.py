"""A segmentor in the browser: one folder of model, contract, page and onnxruntime-web."""

from tinymim.lazy import lazy

_PLACES = {"build_web": "build"}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
