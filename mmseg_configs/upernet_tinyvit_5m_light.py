# TinyViT-5M with a 64-wide UperNet head: with the published 768-wide head the head dominates the time.
_base_ = ["upernet_tinyvit_5m.py"]
model = dict(decode_head=dict(channels=64), auxiliary_head=dict(channels=64))
