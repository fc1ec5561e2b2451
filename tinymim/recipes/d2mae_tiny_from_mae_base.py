"""D2-MAE (arXiv 2404.12210): D-MAE with pixels decoded from block 8 and attention compared at a 13th block that is
dropped afterwards; 78.7 top-1 in the paper, 79.4 with finetune_mae_lite_tiny_rpe.
"""

_base_ = "./dmae_tiny_from_mae_base.py"
method = "d2mae"
