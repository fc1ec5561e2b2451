# Semantic FPN on a plain ViT, as D-MAE-Lite evaluates its students: a 128-wide head on a pyramid of 48-wide levels.
_base_ = ["upernet.py"]
model = dict(
    backbone=dict(pyramid_dim=48),
    decode_head=dict(
        _delete_=True,
        type="FPNHead",
        in_channels=[48, 48, 48, 48],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
