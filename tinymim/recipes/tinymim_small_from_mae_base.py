"""ViT-S from MAE ViT-B directly: 82.3 top-1 at 100 epochs in the paper (table 11)."""

_base_ = "./_base.py"
student = "tinymim_vit_small"
teacher = "timm/vit_base_patch16_224.mae"
