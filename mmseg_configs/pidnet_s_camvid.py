# PIDNet-S of MMSegmentation (pidnet-s_2xb6-120k_1024x1024-cityscapes.py) on CamVid, from scratch: its model, losses and
# SGD, our data and steps. It needs sides that are multiples of 8: others are padded in testing.
_base_ = ["_base_/camvid_others.py"]
data_preprocessor = dict(_base_.data_preprocessor, test_cfg=dict(size_divisor=8))
hard_pixels = dict(type="OhemCrossEntropy", thres=0.9, min_kept=12800, loss_weight=1.0)  # 2 % of a batch, as published
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="PIDNet",
        in_channels=3,
        channels=32,
        ppm_channels=96,
        num_stem_blocks=2,
        num_branch_blocks=3,
        align_corners=False,
        norm_cfg=_base_.norm_cfg,
        act_cfg=dict(type="ReLU", inplace=True),
    ),
    decode_head=dict(
        type="PIDHead",
        in_channels=128,
        channels=128,
        num_classes=11,
        norm_cfg=_base_.norm_cfg,
        act_cfg=dict(type="ReLU", inplace=True),
        align_corners=True,
        loss_decode=[
            dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
            hard_pixels,
            dict(type="BoundaryLoss", loss_weight=20.0),
            hard_pixels,
        ],
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(240, 320), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="GenerateEdge", edge_width=4),  # target of the boundary loss
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005),
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=4001)]
