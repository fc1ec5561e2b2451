# TinyMIM-T with the light head on CamVid (480 x 360, 11 classes): 240 x 320 crops, whole-image test, minutes on a GPU.
_base_ = ["upernet_tinymim_t_light.py"]
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
            [dict(type="Resize", scale_factor=0.75, keep_ratio=True),
             dict(type="Resize", scale_factor=1.0, keep_ratio=True),
             dict(type="Resize", scale_factor=1.25, keep_ratio=True)],
            [dict(type="RandomFlip", prob=0.0, direction="horizontal"),
             dict(type="RandomFlip", prob=1.0, direction="horizontal")],
            [dict(type="LoadLabel")],
            [dict(type="PackSegInputs")],
        ],
    ),
]  # fmt: skip
model = dict(
    data_preprocessor=dict(size=(240, 320)),
    backbone=dict(img_size=(240, 320)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
train_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(data_root=data_root, pipeline=val_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=201),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=4001),
]
train_cfg = dict(max_iters=4000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
