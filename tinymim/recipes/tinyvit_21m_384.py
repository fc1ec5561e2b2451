"""TinyViT-21M at 384 pixels, from 224: 86.2 top-1 in the paper."""

_base_ = "./_tinyvit_384.py"
student = "tiny_vit_21m_384"
drop_path = 0.1
