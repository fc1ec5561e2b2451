# Semantic FPN (128 wide) on MAE-Lite's ViT-Tiny for ADE20K: 39.0 mIoU from D2-MAE, 42.8 from D2-MAE fine-tuned for 1000
# epochs with relative-position bias, in the paper (arXiv 2404.12210). 12 heads, fresh bias tables and layer scale. The
# published neck makes the level at stride 32 by a 1 x 1 convolution and a maximum, ours by a 3 x 3 one of stride 2.
_base_ = ["fpn_tinymim_t.py"]
model = dict(backbone=dict(num_heads=12, rel_pos_bias=True, init_values=1.0))
