"""TinyMIM-S, 83.0 top-1 / 48.4 mIoU in the paper (table 3): the second hop of the chain, teacher TinyMIM-B.

The relation is read in the 16 groups that TinyMIM-B learned, which its file stores (the published code reads 12 heads).
"""

_base_ = "./_base.py"
student = "tinymim_vit_small"
teacher = "runs/tinymim_base_from_mae_large/student.pth"
