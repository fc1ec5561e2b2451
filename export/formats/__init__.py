"""Formats beside ONNX: one file each, registered by :func:`register_format`; a file in this folder is found by itself.

``tinymim-export --format`` reads the registry; docs/formats.md is the table of them, and of those that are refused.
"""

from tinymim.lazy import import_all
from tinymim_export.formats.base import (
    FORMATS,
    REFUSED,
    Format,
    FormatResult,
    Start,
    convert,
    find_format,
    register_format,
)

__all__ = ["FORMATS", "REFUSED", "Format", "FormatResult", "Start", "convert", "find_format", "register_format"]

import_all(__name__)
