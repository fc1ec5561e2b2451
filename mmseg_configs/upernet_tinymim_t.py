# TinyMIM-T + UperNet on ADE20K: 44.0 mIoU in the paper, whose config for plain T is not published: this is that of B
# without relative positions and layer scale; layer decay 0.80 is ours (published for TinyMIM*-T only).
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py"]
