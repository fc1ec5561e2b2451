"""TinyViT-11M at 512 pixels, from 384. The paper has it for 21M only: its settings, and windows as there."""

_base_ = "./tinyvit_11m_384.py"
student_args = dict(window_sizes=(16, 16, 32, 16))
img_size = 512
