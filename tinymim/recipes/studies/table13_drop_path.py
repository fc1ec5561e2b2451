"""Table 13: drop path of teacher and student, full size."""

_base_ = ["./_table13.py", "./_full.py"]
title = "Table 13: drop path (full size)"
