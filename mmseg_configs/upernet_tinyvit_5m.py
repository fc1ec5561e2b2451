# TinyViT-5M + UperNet on ADE20K, otherwise as upernet_tinymim_t.py. Maps of a 512-pixel crop are padded to whole
# windows; without padding, as for 11M and 21M: --cfg-options model.backbone.window_sizes="(16,16,32,16)"
_base_ = ["_base_/upernet_tinyvit_5m.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
