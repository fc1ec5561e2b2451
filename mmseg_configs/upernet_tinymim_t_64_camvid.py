# TinyMIM-T with a 64-wide UperNet head on CamVid: at 512 x 512 the head costs as much as the backbone's 12 blocks.
_base_ = ["upernet_tinymim_t_light_camvid.py"]
model = dict(decode_head=dict(channels=64), auxiliary_head=dict(channels=64))
