"""Table 11: one hop or two, in minutes per cell; next to the paper's ViT-T.

MAE-B is the small form's teacher (256 wide), MAE-S and TinyMIM-S are 192 wide and as deep as the student. All of them
have 8 heads, so every relation is split into 8 groups, and TinyMIM-S is read in the groups its last block was trained
with. The 8-block teachers are read at their last block. TinyMIM-S depends on the seed, the two MAEs do not.
"""

_base_ = "./_small.py"
title = "Table 11: chain (small form)"
paper = dict(
    table=11, metric="ImageNet-1k top-1, ViT-T, 100 epochs a hop", note="A teacher of the next size is the better one"
)
SMALL = dict(embed_dim=192, depth=8, num_heads=8)
TEACHER, DISTILL = _base_.stages.teacher, _base_.stages.distill
stages = dict(
    mae_small={**TEACHER, "cfg_options": {**TEACHER["cfg_options"], "student_args": SMALL}},
    small={**DISTILL, "cfg_options": {**DISTILL["cfg_options"], "student_args": SMALL}},
)
cells = [
    dict(name="from MAE-S", paper=74.1, set={"distill.teacher": "{mae_small.student}"}),
    dict(name="from MAE-B", paper=74.4),
    dict(name="from MAE-B, TinyMIM-S", paper=75.0, set={"distill.teacher": "{small.student}"}),
]
