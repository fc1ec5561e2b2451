# UperNet on TinyViT-11M (10.5 M), otherwise as upernet_tinyvit_5m.py. --student accepts timm's files, the authors' or
# one of our students, of any windows: their tables of attention biases are resized.
_base_ = ["upernet_tinyvit_5m.py"]
model = dict(
    backbone=dict(name="tiny_vit_11m_224"),
    decode_head=dict(in_channels=[64, 128, 256, 448]),
    auxiliary_head=dict(in_channels=256),
)
