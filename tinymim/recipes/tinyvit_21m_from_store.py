"""TinyViT-21M from the sparse logits of any teacher; see tinyvit_5m_from_store."""

_base_ = "./tinyvit_5m_from_store.py"
student = "tiny_vit_21m_224"
drop_path = 0.1
