"""tinymim: distil, segment, export and measure small masked-image-modelling vision transformers.

Lazy on purpose: ``import tinymim`` loads neither torch nor MMSegmentation.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["analysis", "create_model", "data", "distill", "engine", "errors", "load_weights", "models", "seg"]

_FUNCTIONS = {"create_model": "tinymim.models", "load_weights": "tinymim.models"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"tinymim.{name}")
    raise AttributeError(f"module 'tinymim' has no attribute {name!r}")
