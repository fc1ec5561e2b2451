# UperNet on Swin-T (27.5 M), whose four levels need no pyramid. The settings are the plain ViT's, not Swin's own.
# --student accepts timm's swin_tiny_patch4_window7_224 or one of our students; ours decides width, depths and heads.
_base_ = ["upernet.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TinyMIMBackbone",
        name="swin_tiny_patch4_window7_224",
        img_size=(512, 512),
        drop_path_rate=0.1,
        with_cp=False,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
