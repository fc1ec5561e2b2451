"""Mask R-CNN on ViT-T for COCO, 640 pixels, 100 epochs: in MAE-Lite's paper D2-MAE gives 42.5 box and 37.5 mask AP.

Its ViTDet attends in windows in most blocks; here all blocks attend to the whole photo.
"""

_base_ = "./_detect.py"
