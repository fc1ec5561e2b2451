"""TinyViT-11M on ImageNet-22k: the published distillation, 83.2 top-1 after fine-tuning on 1k; see tinyvit_5m_22k."""

_base_ = "./tinyvit_5m_22k.py"
student = "tiny_vit_11m_224"
