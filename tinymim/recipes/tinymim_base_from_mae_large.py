"""TinyMIM-B, 85.0 top-1 / 52.2 mIoU in the paper (table 3): MAE ViT-L (1600 epochs), block 18, 300 epochs."""

_base_ = "./_base.py"
student = "tinymim_vit_base"
teacher = "timm/vit_large_patch16_224.mae"
target_block = 18
