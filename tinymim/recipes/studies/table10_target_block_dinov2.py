"""Table 10: which block of DINOv2 ViT-S is read; fine-tuning and CamVid.

The paper's 12, 15, 18, 21 and 24 of 24 blocks are 6, 7.5 (8), 9, 10.5 (10) and 12 of 12; 11 is here as 12 is worn.
"""

_base_ = "./_dinov2.py"
title = "Table 10: target block (small form, DINOv2 ViT-S/14)"
paper = dict(
    table=10,
    metric="ImageNet-1k top-1 and ADE20K mIoU, ViT-B, 100 epochs",
    note="The paper's block of 24 stands in brackets; the teacher's last block was worn by training for saliency",
)
cells = [
    dict(
        name=f"block {block} of 12" + (f" ({full})" if full else ""),
        paper={"finetune.top1": top1, "segment.mIoU": miou} if full else None,
        set={"distill.cfg_options.target_block": block},
    )
    for block, full, top1, miou in [
        (6, 12, 83.6, 48.7),
        (8, 15, 84.1, 49.8),
        (9, 18, 84.6, 52.2),
        (10, 21, 84.8, 50.6),
        (11, None, None, None),
        (12, 24, 84.4, 50.0),
    ]
]
