# TinyMIM-S with a head as wide as the backbone.
_base_ = ["upernet_tinymim_s.py"]
model = dict(decode_head=dict(channels=384), auxiliary_head=dict(channels=256))
