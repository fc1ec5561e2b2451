# TinyViT-5M with a 64-wide UperNet head on CamVid, otherwise as upernet_tinymim_t_64_camvid.py.
_base_ = ["upernet_tinyvit_5m_camvid.py"]
model = dict(decode_head=dict(channels=64), auxiliary_head=dict(channels=64))
