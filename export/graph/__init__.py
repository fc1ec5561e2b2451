"""A PyTorch model becomes an ONNX file and is compared with it: the floor that imports torch and onnx."""

from tinymim.lazy import lazy

_PLACES = {"export": "convert", "load_torch_model": "torch_model", "verify": "parity"}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
