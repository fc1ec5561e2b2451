# UperNet on TinyViT-5M (5.1 M), whose four levels need no pyramid. The settings are the plain ViT's: no numbers are
# published for this pair. --student accepts timm's tiny_vit_5m_224 or one of our students.
_base_ = ["upernet.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="TinyMIMBackbone",
        name="tiny_vit_5m_224",
        img_size=(512, 512),
        drop_path_rate=0.1,
        with_cp=False,
        init_cfg=None,
    ),
    decode_head=dict(in_channels=[64, 128, 160, 320]),
    auxiliary_head=dict(in_channels=160),
)
