"""TinyMIM-S, 83.0 top-1 / 48.4 mIoU in the paper (table 3): the second hop of the chain, teacher TinyMIM-B.

The relation is read with TinyMIM-B's own 12 heads (the published code groups that block into 16 while training it).
"""

_base_ = "./_base.py"
student = "tinymim_vit_small"
teacher = "runs/tinymim_base_from_mae_large/student.pth"
