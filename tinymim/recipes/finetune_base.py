"""ViT-B on ImageNet-1k: the published recipe (85.0 top-1 in the paper, from TinyMIM-B)."""

_base_ = "./_finetune.py"
