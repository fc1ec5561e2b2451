# A linear head on a plain ViT: one 1 x 1 convolution on the last block's map (stride 16); there is no pyramid.
_base_ = ["upernet.py"]
model = dict(
    backbone=dict(out_indices=(11,)),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=192,
        in_index=0,
        channels=192,
        num_convs=0,  # without convolution and concatenation, only the classifier remains
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
