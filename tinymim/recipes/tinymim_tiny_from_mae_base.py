"""ViT-T from MAE ViT-B directly: 74.4 top-1 at 100 epochs in the paper (table 11)."""

_base_ = "./_base.py"
student = "tinymim_vit_tiny"
teacher = "timm/vit_base_patch16_224.mae"
