"""How fast a file is, where the milliseconds go, and whether two results differ. numpy and onnxruntime only.

The package can be called, for ``tinymim_export.bench`` is the public name of its main function, too.
"""

import sys
from types import ModuleType
from typing import Any


class _BenchPackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """:func:`tinymim_export.bench.latency.bench`."""
        from tinymim_export.bench.latency import bench

        return bench(*args, **kwargs)


sys.modules[__name__].__class__ = _BenchPackage
