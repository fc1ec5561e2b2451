# TinyMIM-B with a head as wide as the backbone: 768, which is the published width, so this is upernet_tinymim_b.py
# under the name that scripts for {t,s,b}_light expect.
_base_ = ["upernet_tinymim_b.py"]
model = dict(decode_head=dict(channels=768))
