# TinyMIM-T with a 64-wide UperNet head on CamVid photos stretched to 512 x 512: trained on 256-pixel crops, tested and
# exported whole, at 512 x 512. The segmentor of docs/deployment.md.
_base_ = ["upernet_tinymim_t_light_camvid.py"]
data_root = "data/camvid"
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabel"),
    dict(type="RandomResize", scale=(512, 512), ratio_range=(0.75, 1.5), keep_ratio=False),
    dict(type="RandomCrop", crop_size=(256, 256), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
val_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="Resize", scale=(512, 512), keep_ratio=False),
    dict(type="LoadLabel"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 512), keep_ratio=False),
    dict(type="PackSegInputs"),
]
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(img_size=(256, 256)),
    decode_head=dict(channels=64),
    auxiliary_head=dict(channels=64),
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = val_dataloader
