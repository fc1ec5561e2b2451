"""D-MAE (arXiv 2404.12210): MAE-Lite's ViT-Tiny also learns the attention of an MAE ViT-B; 78.4 top-1 in the paper."""

_base_ = "./mae_lite_tiny.py"
method = "dmae"
teacher = "timm/vit_base_patch16_224.mae"
