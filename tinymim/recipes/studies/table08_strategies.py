"""Table 8: from scratch, MAE, and what is distilled, for three sizes, 300 epochs, full size.

The paper's chain: MAE ViT-L -> TinyMIM-B -> TinyMIM-S -> TinyMIM-T; the main text does not say who taught the S and T
of the class-token and feature columns, here it is the teacher of the relation column. Relations are grouped by the
teacher's own heads (16, 12, 6). Features are Q, K and V, the best of table 6. Scratch is DeiT's recipe. How S and T are
fine-tuned stands in a supplement that is not public: those recipes are ours.
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

CHAIN = {  # size -> what the distillation of that size differs in
    "base": {},
    "small": {
        "distill.recipe": "tinymim_small_from_tinymim_base",
        "distill.teacher": "{base.student}",
        "distill.cfg_options.target_block": None,
    },
    "tiny": {
        "distill.recipe": "tinymim_tiny_from_tinymim_small",
        "distill.teacher": "{small.student}",
        "distill.cfg_options.target_block": None,
    },
}
FINETUNE = {
    "base": {},
    "small": {"finetune.recipe": "finetune_small", "finetune.epochs": None},
    "tiny": {"finetune.recipe": "finetune_tiny", "finetune.epochs": None},
}
SCRATCH = {
    "finetune.student": None,
    "finetune.epochs": 300,
    "finetune.lr": 1e-3,
    "finetune.cfg_options.layer_decay": 1.0,
    "finetune.cfg_options.drop_path": 0.1,
}
cells = []
for size, numbers in {
    "tiny": (72.2, 71.6, 70.6, 73.4, 75.8),
    "small": (79.9, 80.6, 79.6, 80.8, 83.0),
    "base": (81.2, 83.6, 82.6, 83.8, 85.0),
}.items():
    changes = {
        "scratch": {**SCRATCH, "finetune.model": f"tinymim_vit_{size}"},
        "MAE": {**FINETUNE[size], "mae.recipe": f"mae_{size}", "finetune.student": "{mae.student}"},
        "class token": {**CHAIN[size], **FINETUNE[size], "distill.targets": ["class_token"]},
        "feature": {**CHAIN[size], **FINETUNE[size], "distill.targets": ["qkv"]},
        "relation": {**CHAIN[size], **FINETUNE[size]},
    }
    for (strategy, change), number in zip(changes.items(), numbers):
        cells.append(dict(name=f"{size}: {strategy}", group=f"ViT-{size[0].upper()}", paper=number, set=change))
del size, numbers, changes, strategy, change, number
