# TinyViT-21M + UperNet on ADE20K, otherwise as upernet_tinymim_t.py. Its windows divide the maps of a 512-pixel crop.
_base_ = ["_base_/upernet_tinyvit_21m.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
model = dict(backbone=dict(window_sizes=(16, 16, 32, 16)))
