"""A small tracker for a CPU: half the pixels each way, minutes on generated sequences. Our numbers, not published."""

_base_ = "./_track.py"
img_size = 128
template_size = 64
channels = 64
batch_size = 16
samples = 1600
epochs = 6
base_lr = 1.6e-2  # 1e-3 at batch 16
warmup_epochs = 0.5
drop_path = 0.0
clip_grad = 1.0
gap = 60
