"""TinyViT-5M on ImageNet-1k from random weights: 79.1 top-1 in the paper (arXiv 2207.10666)."""

_base_ = "./_tinyvit.py"
student = "tiny_vit_5m_224"
drop_path = 0.0
