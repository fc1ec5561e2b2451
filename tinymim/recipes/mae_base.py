"""Masked autoencoder, ViT-Base: a teacher if none can be downloaded (decoder: 8 blocks, 512 wide)."""

_base_ = "./_base.py"
method = "mae"
student = "tinymim_vit_base"
epochs = 400
warmup_epochs = 40
drop_path = 0.0
color_jitter = None
decoder = dict(dim=512, depth=8, heads=16)
