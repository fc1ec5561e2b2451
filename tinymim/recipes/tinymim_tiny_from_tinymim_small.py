"""TinyMIM-T, 75.8 top-1 / 44.0 mIoU in the paper (table 3): the last hop of the chain, teacher TinyMIM-S.

Three heads per block, as deployed; the published run pre-trained with 6 (student_args.num_heads=6).
"""

_base_ = "./_base.py"
student = "tinymim_vit_tiny"
teacher = "runs/tinymim_small_from_tinymim_base/student.pth"
