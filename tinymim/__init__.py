"""tinymim: distil, segment, export and measure small masked-image-modelling vision transformers.

Lazy on purpose: ``import tinymim`` loads neither torch nor MMSegmentation.
"""

from tinymim.lazy import lazy

__version__ = "0.1.0"
_PLACES = {
    "create_model": "models",
    "load_weights": "models",
    **dict.fromkeys(("analysis", "data", "demo", "distill", "engine", "errors", "models", "seg", "study"), ""),
}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
