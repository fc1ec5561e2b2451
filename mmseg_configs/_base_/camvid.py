# CamVid (480 x 360, 11 classes), 4000 steps of 8 crops of 240 x 320, minutes on a GPU. Photos are tested whole, at
# their own size. The class names come from the folder's dataset.json.
_base_ = ["runtime.py"]
data_root = "data/camvid"
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(240, 320), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [dict(type="LoadPhoto"), dict(type="LoadLabel"), dict(type="PackSegInputs")]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
tta_pipeline = [
    dict(type="LoadPhoto"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale_factor=0.75, keep_ratio=True),
                dict(type="Resize", scale_factor=1.0, keep_ratio=True),
                dict(type="Resize", scale_factor=1.25, keep_ratio=True),
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadLabel")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="ResumableSampler", shuffle=True),
    dataset=dict(type="TinyMIMSegDataset", data_root=data_root, split="train", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False, round_up=False),
    dataset=dict(type="TinyMIMSegDataset", data_root=data_root, split="val", pipeline=val_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="SegMetric")
test_evaluator = val_evaluator
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="TinyMIMLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay=0.80, published_quirks=False),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=201),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=4001),
]
train_cfg = dict(max_iters=4000, val_interval=1000)
