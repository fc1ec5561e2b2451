"""TinyViT's training from random weights on ImageNet-1k (the authors' code and README, arXiv 2207.10666)."""

_base_ = "./_finetune.py"
epochs = 300
warmup_epochs = 20
base_lr = 2.5e-4  # 1e-3 at batch 1024
min_lr = 1e-5
layer_decay = 1.0
clip_grad = 5.0
