"""TinyViT's fine-tuning on ImageNet-1k from ImageNet-22k (the authors' code): --student is a classifier of 22k, whose
rows of these classes are where the head starts.
"""

_base_ = "./_tinyvit.py"
head = "by_class"
frozen_bn = True
epochs = 30
warmup_epochs = 5
base_lr = 1.25e-4  # 5e-4 at batch 1024
min_lr = 2e-5
weight_decay = 1e-8
layer_decay = 0.8
mixup = 0.0
cutmix = 0.0
