"""TinyViT-11M from the sparse logits of any teacher; see tinyvit_5m_from_store."""

_base_ = "./tinyvit_5m_from_store.py"
student = "tiny_vit_11m_224"
