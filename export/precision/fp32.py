"""FP32: the file as it was exported; only graph variants differ."""

from collections.abc import Sequence
from typing import Any

from tinymim_export.precision.base import Built, Precision, Tolerance, register_precision


@register_precision
class Fp32(Precision):
    """float32 throughout."""

    name, title = "fp32", "FP32"
    about = "graph variants only (tinymim_export.precision.variants)"
    tolerance = Tolerance(0.999999, 0.999)  # rounding only

    def build(self, source: Any, made: Any, excluded: Sequence[str], method: str) -> Built:
        return Built()
