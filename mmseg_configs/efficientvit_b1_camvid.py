# EfficientViT-B1 of timm with the segmentation head of its paper (arXiv 2205.14756) on CamVid, from scratch: its model
# and AdamW, our data and steps.
_base_ = ["_base_/camvid_others.py"]
model = dict(
    type="EncoderDecoder",
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type="TIMMBackbone",
        model_name="efficientvit_b1",
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2, 3),  # strides 4, 8, 16, 32
    ),
    decode_head=dict(
        type="EfficientViTHead",
        in_channels=[64, 128, 256],
        in_index=[1, 2, 3],
        channels=64,
        num_blocks=3,
        dropout_ratio=0.1,
        num_classes=11,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
)
