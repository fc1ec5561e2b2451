"""The chain of the paper's main results (table 3): MAE-L, TinyMIM-B, TinyMIM-S, TinyMIM-T, 300 epochs per hop."""

_base_ = "./_base.py"
chain = "mae_large:base:small:tiny"
