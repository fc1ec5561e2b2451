"""Self-contained HTML pages of runs, files, chains and studies. numpy and Pillow only."""

from tinymim.lazy import lazy

_PLACES = {"Section": "page", "build_report": "lineage_report", "run_report": "page", "write_report": "page"}
__all__ = sorted(_PLACES)
__getattr__ = lazy(__name__, _PLACES)
