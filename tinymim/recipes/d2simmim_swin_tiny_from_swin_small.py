"""D2-MAE of a 48-wide Swin (arXiv 2404.12210): pixels decoded after stage 2, attention compared at one more block that
is dropped afterwards; 77.8 top-1 in the paper, whose pixel head also has a block of its own.
"""

_base_ = "./simmim_swin_tiny.py"
method = "d2simmim"
teacher = "runs/simmim_swin_small/student.pth"
