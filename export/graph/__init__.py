"""Export a PyTorch model to an ONNX file and compare the two. The only part of export/ that imports torch."""

from tinymim.lazy import lazy

_PLACES = {"export": "convert", "load_torch_model": "torch_model", "verify": "parity"}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
