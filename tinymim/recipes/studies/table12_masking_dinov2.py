"""Table 12: raw or masked input, with DINOv2 ViT-S as the teacher; fine-tuning and CamVid."""

_base_ = ["./_table12.py", "./_dinov2.py"]
title = "Table 12: masking (small form, DINOv2 ViT-S/14)"
