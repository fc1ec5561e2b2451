"""SimMIM of the Swin that MAE-Lite calls Swin-Small, timm's swin_tiny (96 wide): the teacher of
d2simmim_swin_tiny_from_swin_small, 800 epochs; no weights of it are published.
"""

_base_ = "./simmim_swin_tiny.py"
student_args = dict(embed_dim=96)
epochs = 800
