# SegFormer's MLP head on a plain ViT: 1 x 1 convolutions map every level to the head's width (the backbone's), all
# levels are up-sampled to stride 4, and another convolution fuses them.
_base_ = ["upernet.py"]
model = dict(
    decode_head=dict(
        _delete_=True,
        type="SegformerHead",
        in_channels=[192, 192, 192, 192],
        in_index=[0, 1, 2, 3],
        channels=192,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
