"""Table 12: raw or masked input, full size."""

_base_ = ["./_table12.py", "./_full.py"]
title = "Table 12: masking (full size)"
