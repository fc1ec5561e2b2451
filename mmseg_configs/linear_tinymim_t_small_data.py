# TinyMIM-T with a linear head for a few hundred labelled photos and a student of the recipe tinymim_tiny_small_data:
# 2000 steps of 8 crops of 240 x 320, the short side of photos at 360 pixels. On CamVid this is linear_tinymim_t_camvid
# with the rate of docs/compare_camvid.md; a student with another start wants a lower one (optim_wrapper.optimizer.lr).
_base_ = ["linear_tinymim_t_camvid.py"]
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(2048, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(240, 320), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="Resize", scale=(2048, 360), keep_ratio=True),
    dict(type="LoadLabel"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 360), keep_ratio=True),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadPhoto"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(1536, 270), keep_ratio=True),
                dict(type="Resize", scale=(2048, 360), keep_ratio=True),
                dict(type="Resize", scale=(2560, 450), keep_ratio=True),
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
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=101),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=2001),
]
train_cfg = dict(max_iters=2000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
