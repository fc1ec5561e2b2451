"""Table 7: which relations teach most, with DINOv2 ViT-S as the teacher; fine-tuning and CamVid."""

_base_ = ["./_table07.py", "./_dinov2.py"]
title = "Table 7: relations (small form, DINOv2 ViT-S/14)"
