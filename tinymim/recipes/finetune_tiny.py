"""ViT-T on ImageNet-1k (75.8 in the paper). Our numbers: the paper's are in a supplement that is not public.

The authors only say "higher learning rate and larger batch" than ViT-B (their issue 5). Weaker mixing, no erasing, no
drop path and layer decay 0.85 follow what MAE-Lite (arXiv 2205.14443) found for ViT-T.
"""

_base_ = "./_finetune.py"
student = "tinymim_vit_tiny"
batch_size = 2048  # gives a peak learning rate of 4e-3, twice that of B
layer_decay = 0.85
drop_path = 0.0
mixup = 0.2
cutmix = 0.0
reprob = 0.0
smoothing = 0.0
epochs = 300
