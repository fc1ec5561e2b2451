# TinyMIM-T with a 64-wide UperNet head on CamVid: a third of the multiply-adds of the 12 blocks before it.
_base_ = ["upernet_tinymim_t_light_camvid.py"]
model = dict(decode_head=dict(channels=64), auxiliary_head=dict(channels=64))
