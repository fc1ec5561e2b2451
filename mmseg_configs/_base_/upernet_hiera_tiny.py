# UperNet on Hiera-T (27.1 M), whose four levels need no pyramid. The settings are the plain ViT's: no numbers are
# published for this pair. --student accepts timm's hiera_tiny_224 (224 pixels, resized here) or one of our students:
# ours decides width, heads and stages (46 wide: recipe hiera_tiny_from_hiera_base).
_base_ = ["upernet.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TinyMIMBackbone",
        name="hiera_tiny_224",
        img_size=(512, 512),
        drop_path_rate=0.1,
        with_cp=False,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
