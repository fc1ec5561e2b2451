# TinyMIM-T with a head as wide as the backbone: with the published 768-wide head the head dominates the time.
_base_ = ["upernet_tinymim_t.py"]
model = dict(decode_head=dict(channels=192), auxiliary_head=dict(channels=192))
