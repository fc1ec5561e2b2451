"""Table 5: what the class token teaches, in minutes per cell."""

_base_ = ["./_table05.py", "./_small.py"]
title = "Table 5: class token (small form)"
