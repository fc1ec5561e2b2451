"""Which precision, graph variant and runtime to ship: candidates measured, scored and judged."""

from tinymim.lazy import lazy

_PLACES = {"TuneResult": "result", "tune": "search"}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
