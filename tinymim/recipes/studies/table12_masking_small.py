"""Table 12: raw or masked input, in minutes per cell."""

_base_ = ["./_table12.py", "./_small.py"]
title = "Table 12: masking (small form)"
