# The demo's segmentor: a tiny student (192 wide, 4 blocks) and a 64-wide head, 128-pixel crops, minutes on two cores.
_base_ = ["upernet_tinymim_t_light.py"]
data_root = "data/scenes"
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(128, 128), cat_max_ratio=0.9),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadLabel"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadPhoto"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(160, 160), keep_ratio=True),
                dict(type="Resize", scale=(224, 224), keep_ratio=True),
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
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(img_size=(128, 128), depth=4, out_indices=(0, 1, 2, 3), drop_path_rate=0.0),
    decode_head=dict(channels=64, num_classes=12),
    auxiliary_head=dict(channels=64, num_classes=12),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_dataloader = dict(batch_size=16, num_workers=2, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(data_root=data_root, pipeline=val_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=31),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=301),
]
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=300, log_interval=1))
