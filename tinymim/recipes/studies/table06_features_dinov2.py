"""Table 6: which feature teaches most, with DINOv2 ViT-S as the teacher; fine-tuning and CamVid."""

_base_ = ["./_table06.py", "./_dinov2.py"]
title = "Table 6: features (small form, DINOv2 ViT-S/14)"
cells = _base_.cells
cells[0]["set"]["segment.student"] = "{mae.student}"
cells[1]["set"]["distill.cfg_options.target_block"] = 11  # of 12; the last is worn
