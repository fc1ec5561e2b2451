# TinyMIM-T with SegFormer's MLP head (192 wide) on ADE20K, otherwise as upernet_tinymim_t.py.
_base_ = ["_base_/segformer.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
