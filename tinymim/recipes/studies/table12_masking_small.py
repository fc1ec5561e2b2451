"""Table 12: raw or masked input, in minutes a cell."""

_base_ = ["./_table12.py", "./_small.py"]
title = "Table 12: masking (small form)"
