# TinyMIM-T with a linear head on ADE20K, otherwise as upernet_tinymim_t.py.
_base_ = ["_base_/linear.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
