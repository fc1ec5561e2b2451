"""Files of other precisions and graphs from a verified FP32 file. onnx is imported inside the functions, torch never.

Importing the package registers every precision in it. Help texts and reports list those named here first.
"""

from tinymim.lazy import import_all

# isort: off
from tinymim_export.precision.base import PRECISIONS, Built, Precision, Tolerance, register_precision
from tinymim_export.precision.fp32 import Fp32
from tinymim_export.precision.fp16 import Fp16
from tinymim_export.precision.int8 import Int8
from tinymim_export.precision.int8_smooth import Int8Smooth
from tinymim_export.precision.int8_wide import Int8Wide
from tinymim_export.precision.int8_dynamic import Int8Dynamic
from tinymim_export.precision.int8_weights import Int8Weights
# isort: on

__all__ = [
    "PRECISIONS",
    "Built",
    "Fp16",
    "Fp32",
    "Int8",
    "Int8Dynamic",
    "Int8Smooth",
    "Int8Weights",
    "Int8Wide",
    "Precision",
    "Tolerance",
    "register_precision",
]

import_all(  # those that are not named above, too
    __name__, besides={"agreement", "blocks", "calibrate", "float_file", "quantize", "sensitivity", "variants"}
)
