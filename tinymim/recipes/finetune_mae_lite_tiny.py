"""MAE-Lite's "improved" fine-tuning of ViT-Tiny (arXiv 2205.14443).

In the papers 78.0 top-1 from MAE, 78.4 from D-MAE, 78.7 from D2-MAE, 75.8 from scratch.
"""

_base_ = "./finetune_tiny.py"
num_heads = 12
batch_size = 1024
base_lr = 1e-3  # 4e-3 at batch 1024
aa = "rand-m10-mstd0.5-inc1"
