"""Rows of table 5. The paper does not say which block's class token is read; here it is the block of all other rows.

With MAE's loss both sides are masked: student and teacher see the visible patches only (as in table 12).
"""

paper = dict(table=5, metric="ImageNet-1k top-1, ViT-B, 100 epochs", note="Class-token distillation below plain MAE")
cells = [
    dict(name="MAE", paper=83.6, set={"finetune.student": "{mae.student}"}),
    dict(name="class token", paper=80.6, set={"distill.targets": ["class_token"]}),
    dict(
        name="class token + MAE reconstruction",
        paper=82.1,
        set={
            "distill.targets": ["class_token"],
            "distill.cfg_options.mask": "both",
            "distill.cfg_options.reconstruct": 1.0,
        },
    ),
]
