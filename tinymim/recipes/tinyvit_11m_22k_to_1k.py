"""TinyViT-11M on ImageNet-1k after distillation on ImageNet-22k: 83.2 top-1 in the paper."""

_base_ = "./_tinyvit_22k_to_1k.py"
student = "tiny_vit_11m_224"
drop_path = 0.0
