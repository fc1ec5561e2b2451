"""Kept for callers of 0.1: the file to import is :mod:`tinymim_export.runtime.photos`."""

from tinymim_export.runtime.photos import load_photos, normalise

__all__ = ["load_photos", "normalise"]
