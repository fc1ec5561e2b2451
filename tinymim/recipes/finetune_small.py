"""ViT-S on ImageNet-1k (83.0 in the paper). Our numbers: the paper's are in a supplement that is not public.

The authors only say "higher learning rate and larger batch" than ViT-B (their issue 5).
"""

_base_ = "./_finetune.py"
student = "tinymim_vit_small"
batch_size = 2048  # gives a peak learning rate of 4e-3, twice that of B
layer_decay = 0.75
drop_path = 0.1
epochs = 200
