"""Table 13: drop path of teacher and student, in minutes per cell."""

_base_ = ["./_table13.py", "./_small.py"]
title = "Table 13: drop path (small form)"
