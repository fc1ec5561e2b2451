"""Hiera's masked autoencoder (arXiv 2306.00989) of MAE-Lite's 6.5 M model: 78.5 top-1 in the paper (arXiv 2404.12210).

Masks are whole units of 32 pixels. MAE-Lite masks 0.4 of them, Hiera itself 0.6, and pre-trains with q_pool=2.
"""

_base_ = "./mae_lite_tiny.py"
method = "hiera_mae"
student = "hiera_tiny_224"
student_args = dict(_delete_=True, embed_dim=46, num_heads=1, stages=(1, 2, 7, 2))
mask_ratio = 0.4
