"""Table 13: drop path of teacher and student, with DINOv2 ViT-S as the teacher; fine-tuning and CamVid."""

_base_ = ["./_table13.py", "./_dinov2.py"]
title = "Table 13: drop path (small form, DINOv2 ViT-S/14)"
