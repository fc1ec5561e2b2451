"""TinyViT-21M on ImageNet-1k from random weights: 83.1 top-1 in the paper (arXiv 2207.10666)."""

_base_ = "./_tinyvit.py"
student = "tiny_vit_21m_224"
drop_path = 0.2
