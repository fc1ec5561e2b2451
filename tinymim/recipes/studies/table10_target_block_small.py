"""Table 10: which block of the teacher is read, in minutes per cell: 5, 6, 8, 9, 10 of 10 for 12 to 24 of 24."""

_base_ = "./_small.py"
title = "Table 10: target block (small form)"
paper = dict(
    table=10,
    metric="ImageNet-1k top-1, ViT-B, 100 epochs",
    note="The paper's block of 24 stands in brackets; 6.25, 7.5 and 8.75 were rounded to 6, 8 and 9",
)
cells = [
    dict(name=f"block {block} of 10 ({full})", paper=top1, set={"distill.cfg_options.target_block": block})
    for block, full, top1 in [(5, 12, 83.6), (6, 15, 84.1), (8, 18, 84.6), (9, 21, 84.8), (10, 24, 84.4)]
]
