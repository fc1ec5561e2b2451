# TinyMIM-S + UperNet on ADE20K, the published setting (48.4 mIoU, no config published).
# Layer decay 0.80 is ours, not published.
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(embed_dim=384, num_heads=6),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
