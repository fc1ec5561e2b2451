"""Tables 8 and 9: from scratch, MAE, and what is distilled from DINOv2 ViT-S; fine-tuning and CamVid."""

_base_ = "./_dinov2.py"
title = "Tables 8 and 9: strategies (small form, DINOv2 ViT-S/14)"
paper = dict(
    table=8,
    metric="ImageNet-1k top-1, ViT-T, 300 epochs (table 8); ADE20K mIoU, ViT-B, 300 epochs (table 9)",
    note="Relations the best everywhere; MAE hurts the smallest and helps the others; the class token hurts",
)
cells = [
    dict(
        name="scratch",  # nothing learned to be kept: every layer at the full rate
        paper={"finetune.top1": 72.2, "segment.mIoU": 47.2},
        set={
            "finetune.student": None,
            "finetune.model": "tinymim_vit_tiny",
            "finetune.cfg_options.layer_decay": 1.0,
            "segment.student": None,
            "segment.cfg_options.optim_wrapper.paramwise_cfg.layer_decay": 1.0,
        },
    ),
    dict(
        name="MAE",
        paper={"finetune.top1": 71.6, "segment.mIoU": 48.1},
        set={"finetune.student": "{mae.student}", "segment.student": "{mae.student}"},
    ),
    dict(
        name="class token",
        paper={"finetune.top1": 70.6, "segment.mIoU": 46.2},
        set={"distill.targets": ["class_token"]},
    ),
    dict(name="feature", paper={"finetune.top1": 73.4, "segment.mIoU": 47.7}, set={"distill.targets": ["qkv"]}),
    dict(name="relation", paper={"finetune.top1": 75.8, "segment.mIoU": 52.2}),
]
