"""Rows of table 6. The output feature is the last block's; the others are read at the block all other tables read."""

paper = dict(table=6, metric="ImageNet-1k top-1, ViT-B, 100 epochs", note="Q/K/V the best of the features")
cells = [
    dict(name="MAE", paper=83.6, set={"finetune.student": "{mae.student}"}),
    dict(name="output", paper=83.7, set={"distill.targets": ["output"], "distill.cfg_options.target_block": 24}),
    dict(name="FFN, before the residual", paper=84.2, set={"distill.targets": ["ffn_pre"]}),
    dict(name="FFN, after the residual", paper=81.8, set={"distill.targets": ["ffn_post"]}),
    dict(name="attention, before the residual", paper=84.1, set={"distill.targets": ["attn_pre"]}),
    dict(name="attention, after the residual", paper=81.3, set={"distill.targets": ["attn_post"]}),
    dict(name="Q, K, V", paper=84.3, set={"distill.targets": ["qkv"]}),
]
