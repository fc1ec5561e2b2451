"""Table 8: from scratch, MAE, and what is distilled, in minutes per cell; next to the paper's ViT-T.

One size, taught by the MAE directly: the paper's ViT-T had TinyMIM-S as teacher (table 11 has the chain).
"""

_base_ = "./_small.py"
title = "Table 8: strategies (small form)"
paper = dict(
    table=8,
    metric="ImageNet-1k top-1, ViT-T, 300 epochs",
    note="Relations the best for every size; MAE hurts the smallest and helps the others",
)
cells = [
    dict(
        name="scratch",  # nothing learned to be kept: every layer at the full rate
        paper=72.2,
        set={
            "finetune.student": None,
            "finetune.model": "tinymim_vit_tiny",
            "finetune.cfg_options.layer_decay": 1.0,
        },
    ),
    dict(name="MAE", paper=71.6, set={"finetune.student": "{mae.student}"}),
    dict(name="class token", paper=70.6, set={"distill.targets": ["class_token"]}),
    dict(name="feature", paper=73.4, set={"distill.targets": ["qkv"]}),
    dict(name="relation", paper=75.8),
]
