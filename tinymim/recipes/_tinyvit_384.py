"""TinyViT's fine-tuning at 384 pixels (the authors' code): --student is the classifier of 224 pixels, whose tables of
attention biases are resized to larger windows.
"""

_base_ = "./_tinyvit_22k_to_1k.py"
img_size = 384
eval_squash = True
base_lr = 1e-5  # 4e-5 at batch 1024
min_lr = 4e-7
layer_decay = 1.0
