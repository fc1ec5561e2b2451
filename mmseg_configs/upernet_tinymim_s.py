# TinyMIM-S + UperNet on ADE20K: 48.4 mIoU in the paper, whose config for this size is not published: this is that of
# B without relative positions and layer scale; layer decay 0.80 is ours.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(embed_dim=384, num_heads=6),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
