"""Table 7: which relations teach most, full size."""

_base_ = ["./_table07.py", "./_full.py"]
title = "Table 7: relations (full size)"
