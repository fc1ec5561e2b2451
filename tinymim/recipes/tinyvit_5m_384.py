"""TinyViT-5M at 384 pixels, from 224. The paper has it for 21M only: its settings, and windows as there."""

_base_ = "./_tinyvit_384.py"
student = "tiny_vit_5m_224"
student_args = dict(window_sizes=(12, 12, 24, 12))
drop_path = 0.0
