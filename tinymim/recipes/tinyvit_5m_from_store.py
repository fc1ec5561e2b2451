"""TinyViT-5M (arXiv 2207.10666) from the sparse logits of any teacher that were written once:

    tinymim cache --teacher timm/NAME --data FOLDER --img-size 224 --epochs 300 --out STORE
    tinymim distill --recipe tinyvit_5m_from_store --store STORE --data FOLDER

The views are those of the store. Rate, epochs and batch are the published ones of training on ImageNet-1k from labels,
drop path that of the published distillation on ImageNet-22k: on 1k no distillation is published. --teacher timm/NAME in
place of --store runs the teacher beside the student, on TinyViT's views.
"""

_base_ = "./_base.py"
method = "fast_distill"
student = "tiny_vit_5m_224"
drop_path = 0.0
crop_scale = (0.08, 1.0)
color_jitter = None
batch_size = 1024
epochs = 300
warmup_epochs = 20
base_lr = 2.5e-4  # 5e-4 at batch 512
min_lr = 1e-5
betas = (0.9, 0.999)
weight_decay = 0.05
