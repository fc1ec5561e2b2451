# TinyViT-11M with a 192-wide UperNet head on CamVid, otherwise as upernet_tinymim_t_light_camvid.py.
_base_ = ["_base_/upernet_tinyvit_11m.py", "_base_/camvid.py"]
model = dict(
    data_preprocessor=dict(size=(240, 320)),
    backbone=dict(img_size=(240, 320)),
    decode_head=dict(channels=192, num_classes=11),
    auxiliary_head=dict(channels=192, num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)
