# TinyMIM-B + UperNet on ADE20K, as published (52.47 mIoU in the published log; one seed).
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(embed_dim=768, num_heads=12, rel_pos_bias=True, init_values=1.0),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
