"""TinyViT-5M on ImageNet-22k (arXiv 2207.10666): the published distillation, 80.7 top-1 after fine-tuning on 1k.

The paper's teacher is a CLIP ViT-L/14 fine-tuned on ImageNet-22k; of timm's, beitv2_large_patch16_224.in1k_ft_in22k has
these 21,841 classes. 481 GiB for 90 epochs:

    tinymim cache --teacher timm/beitv2_large_patch16_224.in1k_ft_in22k --data IN22K --topk 100 --epochs 90 --out STORE
    tinymim distill --recipe tinyvit_5m_22k --store STORE --data IN22K
"""

_base_ = "./tinyvit_5m_from_store.py"
topk = 100
classes = 21841
rand_augment = "m9-mstd0.5-inc1"
erasing = 0.25
mixup = 0.0
cutmix = 0.0
batch_size = 4096
epochs = 90
warmup_epochs = 5
base_lr = 1.25e-4  # 2.5e-4 at batch 512
min_lr = 4e-5
weight_decay = 0.01
