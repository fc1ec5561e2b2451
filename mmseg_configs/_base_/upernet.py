# UperNet on a plain ViT, as TinyMIM published it: head width 768, auxiliary FCN head, slide test 512 / 341.
# The settings are those of ViT-T with 12 blocks; the files one level up give the differences. To narrow the heads:
# --cfg-options model.decode_head.channels=64 model.auxiliary_head.channels=64
# SyncBN becomes BN if training is not distributed over GPUs.
norm_cfg = dict(type="SyncBN", requires_grad=True)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=(512, 512),
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="TinyMIMBackbone",
        img_size=(512, 512),
        patch_size=16,
        embed_dim=192,
        depth=12,
        num_heads=3,
        rel_pos_bias=False,
        init_values=None,
        drop_path_rate=0.1,
        out_indices=(3, 5, 7, 11),
        norm_cfg=norm_cfg,
        with_cp=False,  # True saves memory but costs a quarter of the speed
        init_cfg=None,  # dict(type="Pretrained", checkpoint="student.pth"), or --student student.pth
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[192, 192, 192, 192],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=192,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
