"""MAE-Lite's "improved" fine-tuning of ViT-Small (arXiv 2205.14443): in the paper 82.1 from MAE, 82.5 from D-MAE, 80.2
from scratch.
"""

_base_ = "./finetune_mae_lite_tiny.py"
student = "tinymim_vit_small"
layer_decay = 0.75
