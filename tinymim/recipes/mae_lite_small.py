"""MAE-Lite, ViT-Small with 12 heads (arXiv 2205.14443): 82.1 top-1 with finetune_mae_lite_small in the paper."""

_base_ = "./mae_lite_tiny.py"
student = "tinymim_vit_small"
decoder = dict(dim=192, depth=1, heads=6)
