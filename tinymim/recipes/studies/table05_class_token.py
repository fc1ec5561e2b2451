"""Table 5: what the class token teaches, full size."""

_base_ = ["./_table05.py", "./_full.py"]
title = "Table 5: class token (full size)"
