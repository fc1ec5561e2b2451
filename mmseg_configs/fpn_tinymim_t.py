# TinyMIM-T with Semantic FPN (128 wide) on ADE20K, otherwise as upernet_tinymim_t.py.
_base_ = ["_base_/fpn.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
