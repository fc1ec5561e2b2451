"""Table 6: which feature teaches most, full size."""

_base_ = ["./_table06.py", "./_full.py"]
title = "Table 6: features (full size)"
