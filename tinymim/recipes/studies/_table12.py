"""Rows of table 12. The paper does not say whose input was masked; here both sides see the same visible quarter."""

paper = dict(table=12, metric="ImageNet-1k top-1, ViT-B, 100 epochs", note="The raw image is the default")
cells = [
    dict(name="raw image", paper=84.6),
    dict(name="masked image", paper=83.9, set={"distill.cfg_options.mask": "both"}),
    dict(
        name="masked image + MAE reconstruction",
        paper=84.0,
        set={"distill.cfg_options.mask": "both", "distill.cfg_options.reconstruct": 1.0},
    ),
]
