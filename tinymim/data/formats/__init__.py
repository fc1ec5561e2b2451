"""Formats that ``tinymim data --from`` reads: one file each, which registers its reader and how the format is known."""

from tinymim.data.formats.base import FORMATS, Reader, Sample, Source, register_format
from tinymim.lazy import import_all

__all__ = ["FORMATS", "Reader", "Sample", "Source", "register_format"]

import_all(__name__)
