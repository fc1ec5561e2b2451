"""Table 6: which feature teaches most, in minutes per cell."""

_base_ = ["./_table06.py", "./_small.py"]
title = "Table 6: features (small form)"
cells = _base_.cells
cells[1]["set"]["distill.cfg_options.target_block"] = 10  # the last one
