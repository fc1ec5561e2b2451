"""TinyMIM*-T on ImageNet-1k (79.6 in the paper): 12 heads, distillation token, 1280-wide layer, 1000 epochs.

Known: the architecture, the 1000 epochs, and "DeiT-style" distillation. Ours: everything else (issue 8 of the authors'
repository asks, unanswered); teacher, hard labels and alpha are DeiT's. --student takes a TinyMIM-T; its heads are
regrouped.
"""

_base_ = "./finetune_tiny.py"
student = "tinymim_vit_star_tiny"
num_heads = 12
teacher = "timm/regnety_160.deit_in1k"
epochs = 1000
