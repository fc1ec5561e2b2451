"""TinyViT-11M on ImageNet-1k from random weights: 81.5 top-1 in the paper (arXiv 2207.10666)."""

_base_ = "./_tinyvit.py"
student = "tiny_vit_11m_224"
drop_path = 0.1
