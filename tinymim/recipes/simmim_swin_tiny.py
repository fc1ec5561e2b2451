"""SimMIM (arXiv 2111.09886) of MAE-Lite's 48-wide Swin: 77.4 top-1 in the paper (arXiv 2404.12210).

The published rate is constant after the warm-up and gradients are clipped at 5; ours falls along half a cosine, as
everywhere here, without clipping.
"""

_base_ = "./_base.py"
method = "simmim"
student = "swin_tiny_patch4_window7_224"
student_args = dict(embed_dim=48)
epochs = 400
warmup_epochs = 10
batch_size = 2048
base_lr = 5e-5  # 4e-4 at batch 2048
betas = (0.9, 0.99)
drop_path = 0.0
color_jitter = None
crop_scale = (0.67, 1.0)
