"""Table 10: which block of the teacher is read (24 blocks), full size; top-1 and, through UperNet, ADE20K's mIoU."""

_base_ = "./_full.py"
title = "Table 10: target block (full size)"
paper = dict(
    table=10,
    metric="ImageNet-1k top-1 and ADE20K mIoU, ViT-B, 100 epochs",
    note="The text calls block 18 the best; it is for segmentation, top-1 peaks at 21",
)
stages = dict(
    segment=dict(
        verb="segment",
        config="upernet_tinymim_b",
        student="{distill.student}",
        data_root="{segments}",
        cfg_options={"randomness.seed": "{seed}"},
    )
)
cells = [
    dict(
        name=f"block {block}",
        paper={"finetune.top1": top1, "segment.mIoU": miou},
        set={"distill.cfg_options.target_block": block},
    )
    for block, top1, miou in [(12, 83.6, 48.7), (15, 84.1, 49.8), (18, 84.6, 52.2), (21, 84.8, 50.6), (24, 84.4, 50.0)]
]
also = ["segment.mIoU"]
