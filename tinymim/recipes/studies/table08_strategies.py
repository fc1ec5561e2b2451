"""Table 8: from scratch, MAE, and what is distilled, for three sizes, 300 epochs, full size.

The paper's chain: MAE ViT-L -> TinyMIM-B -> TinyMIM-S -> TinyMIM-T; the main text does not name the teachers of S and T
in the class-token and feature columns; here they are those of the relation column. A student that teaches is read in
the groups of the relations it learned (MAE-L's 16); relations train only q, k and v of its last block, so its class
token is read one block before. Features are Q, K and V, the best of table 6. Scratch uses DeiT's epochs, rate and drop
path, otherwise our fine-tuning (mean of the patch tokens, no repeated augmentation). The fine-tuning of S and T is in a
supplement that is not public: those recipes are ours.
"""

_base_ = "./_full.py"
title = "Table 8: strategies (full size)"
paper = dict(table=8, metric="ImageNet-1k top-1, 300 epochs", note="Relations the best for every size")

DISTILL = {**_base_.stages.distill, "epochs": 300}
TO_SMALL = {
    "recipe": "tinymim_small_from_tinymim_base",
    "teacher": "{base.student}",
    "cfg_options": {**DISTILL["cfg_options"], "target_block": None},
}
stages = dict(base=DISTILL, small={**DISTILL, **TO_SMALL}, distill=dict(epochs=300))

CHAIN = {  # size -> its distillation; the student's last block reads the teacher's last, but for MAE-L
    "tiny": {
        "distill.recipe": "tinymim_tiny_from_tinymim_small",
        "distill.teacher": "{small.student}",
        "distill.cfg_options.target_block": None,
        "finetune.recipe": "finetune_tiny",
        "finetune.model": "tinymim_vit_tiny",
        "finetune.epochs": None,
    },
    "small": {
        "distill.recipe": "tinymim_small_from_tinymim_base",
        "distill.teacher": "{base.student}",
        "distill.cfg_options.target_block": None,
        "finetune.recipe": "finetune_small",
        "finetune.model": "tinymim_vit_small",
        "finetune.epochs": None,
    },
    "base": {},
}
SCRATCH = {
    "finetune.student": None,
    "finetune.recipe": "finetune_base",
    "finetune.epochs": 300,
    "finetune.lr": 1e-3,
    "finetune.cfg_options.layer_decay": 1.0,
    "finetune.cfg_options.drop_path": 0.1,
}
STRATEGIES = {
    "scratch": SCRATCH,
    "MAE": {"finetune.student": "{mae.student}"},
    "class token": {"distill.targets": ["class_token"]},
    "feature": {"distill.targets": ["qkv"]},
    "relation": {},
}
BEFORE = {"distill.targets": ["class_token@11"]}  # of 12
TOP1 = {
    "tiny": (72.2, 71.6, 70.6, 73.4, 75.8),
    "small": (79.9, 80.6, 79.6, 80.8, 83.0),
    "base": (81.2, 83.6, 82.6, 83.8, 85.0),
}
cells = [
    dict(
        name=f"{size}: {strategy}",
        group=f"ViT-{size[0].upper()}",
        paper=number,
        set={
            **CHAIN[size],
            "mae.recipe": f"mae_{size}",
            **change,
            **(BEFORE if strategy == "class token" and size != "base" else {}),
        },
    )
    for size, numbers in TOP1.items()
    for (strategy, change), number in zip(STRATEGIES.items(), numbers, strict=True)
]
