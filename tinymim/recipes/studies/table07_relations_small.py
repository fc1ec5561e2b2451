"""Table 7: which relations teach most, in minutes per cell."""

_base_ = ["./_table07.py", "./_small.py"]
title = "Table 7: relations (small form)"
