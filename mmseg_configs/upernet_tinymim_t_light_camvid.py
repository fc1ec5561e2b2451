# TinyMIM-T with the light head on CamVid (480 x 360, 11 classes): 240 x 320 crops, whole-image test, minutes on a GPU.
_base_ = ["_base_/upernet.py", "_base_/camvid.py"]
model = dict(
    data_preprocessor=dict(size=(240, 320)),
    backbone=dict(img_size=(240, 320)),
    decode_head=dict(channels=192, num_classes=11),
    auxiliary_head=dict(channels=192, num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
