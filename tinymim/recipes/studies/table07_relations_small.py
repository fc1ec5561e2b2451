"""Table 7: which relations teach most, in minutes a cell."""

_base_ = ["./_table07.py", "./_small.py"]
title = "Table 7: relations (small form)"
