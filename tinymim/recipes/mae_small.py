"""Masked autoencoder, ViT-Small: a teacher if none can be downloaded (decoder: 1 block, 192 wide)."""

_base_ = "./_base.py"
method = "mae"
student = "tinymim_vit_small"
epochs = 400
warmup_epochs = 40
drop_path = 0.0
color_jitter = None
decoder = dict(dim=192, depth=1, heads=6)
