# TinyMIM*-T + UperNet on ADE20K, as published (45.00 mIoU in the published log; starts from a student fine-tuned on
# ImageNet: 12 heads, distillation token, 1280-wide last layer, all levels 768 wide).
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(
    backbone=dict(num_heads=12, rel_pos_bias=True, init_values=1.0, dist_token=True, last_dim=1280, pyramid_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.80))
