# Swin-T + UperNet on ADE20K, otherwise as upernet_tinymim_t.py.
_base_ = ["_base_/upernet_swin_tiny.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
