"""MAE-Lite, ViT-Tiny with 12 heads (arXiv 2205.14443): 78.0 top-1 with finetune_mae_lite_tiny in the paper.

The published crops are resized by bilinear or bicubic interpolation at random; ours are bicubic.
"""

_base_ = "./mae_tiny.py"
student_args = dict(num_heads=12)
crop_scale = (0.08, 1.0)
