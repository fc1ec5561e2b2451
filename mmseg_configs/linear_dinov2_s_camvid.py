# DINOv2 ViT-S/14 (or another ViT-S of patch 14) with a linear head on CamVid, otherwise as linear_tinymim_t_camvid.py:
# the teacher as a segmentor. --student takes timm's vit_small_patch14_dinov2; block 11 of 12 is read, the best of the
# weights that docs/compare.md was measured with. model.backbone.frozen=True trains the head only.
_base_ = ["linear_tinymim_t_camvid.py"]
model = dict(
    backbone=dict(img_size=(518, 518), patch_size=14, embed_dim=384, num_heads=6, init_values=1e-5, out_indices=(10,)),
    decode_head=dict(in_channels=384, channels=384),
)
