# TinyMIM-T + UperNet on ADE20K, the published setting. Published: no config and no number for plain T;
# layer decay 0.80 is ours (published for TinyMIM*-T only).
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
