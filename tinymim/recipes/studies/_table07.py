"""Rows of table 7. Without softmax the loss is ours (smooth L1 of the scaled scores): the paper states none."""

paper = dict(table=7, metric="ImageNet-1k top-1, ViT-B, 100 epochs", note="Q-K and V-V with softmax are the default")
cells = [
    dict(
        name="QQ + KK + VV, no softmax",
        paper=84.4,
        set={"distill.targets": ["qq+kk+vv"], "distill.cfg_options.softmax": False},
    ),
    dict(name="QQ + KK + VV, softmax", paper=84.5, set={"distill.targets": ["qq+kk+vv"]}),
    dict(name="QK + VV, no softmax", paper=84.4, set={"distill.cfg_options.softmax": False}),
    dict(name="QK + VV, softmax", paper=84.6),
]
