"""D-MAE of a 6.5 M Hiera from MAE's Hiera-B (arXiv 2404.12210): attention of the last blocks; 78.9 top-1 in the paper.

Offline: --teacher-weights FILE takes timm's file or Meta's mae_hiera_base_224.pth, whose licence is CC-BY-NC.
"""

_base_ = "./mae_hiera_tiny.py"
method = "hiera_dmae"
teacher = "timm/hiera_base_224.mae"
