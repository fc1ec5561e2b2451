"""TinyViT-21M at 512 pixels, from 384: 86.5 top-1 in the paper."""

_base_ = "./tinyvit_21m_384.py"
student = "tiny_vit_21m_512"
img_size = 512
