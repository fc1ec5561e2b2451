"""Table 11: one hop or two, 100 epochs each, full size.

A student that teaches is read in the groups of the relations it learned: TinyMIM-B in MAE-L's 16, TinyMIM-S in
MAE-B's 12; an MAE in its own heads. The published code reads TinyMIM-B in 12, and cannot run the hop from S to T.
The fine-tuning of S and T is in a supplement that is not public: those recipes are ours.
"""

_base_ = "./_full.py"
title = "Table 11: chain (full size)"
paper = dict(
    table=11, metric="ImageNet-1k top-1, 100 epochs a hop", note="A teacher of the next size is the better one"
)

DISTILL = _base_.stages.distill
LAST = {**DISTILL["cfg_options"], "target_block": None}
MAE_B = {"recipe": "tinymim_small_from_mae_base", "teacher": "timm/vit_base_patch16_224.mae", "cfg_options": LAST}
stages = dict(
    mae=dict(recipe="mae_small"),
    base=DISTILL,
    small={**DISTILL, **MAE_B},
    finetune=dict(epochs=None),
)
TO_S = {"distill.recipe": "tinymim_small_from_mae_base", "finetune.recipe": "finetune_small"}
TO_T = {
    "distill.recipe": "tinymim_tiny_from_mae_base",
    "finetune.recipe": "finetune_tiny",
    "distill.cfg_options.target_block": None,
}
cells = [
    dict(
        name="S from MAE-B",
        group="ViT-S",
        paper=82.3,
        set={**TO_S, "distill.teacher": "timm/vit_base_patch16_224.mae", "distill.cfg_options.target_block": None},
    ),
    dict(name="S from MAE-L", group="ViT-S", paper=82.1, set=TO_S),
    dict(
        name="S from MAE-L, TinyMIM-B",
        group="ViT-S",
        paper=82.6,
        set={**TO_S, "distill.teacher": "{base.student}", "distill.cfg_options.target_block": None},
    ),
    dict(name="T from MAE-S", group="ViT-T", paper=74.1, set={**TO_T, "distill.teacher": "{mae.student}"}),
    dict(
        name="T from MAE-B",
        group="ViT-T",
        paper=74.4,
        set={**TO_T, "distill.teacher": "timm/vit_base_patch16_224.mae"},
    ),
    dict(name="T from MAE-B, TinyMIM-S", group="ViT-T", paper=75.0, set={**TO_T, "distill.teacher": "{small.student}"}),
]
