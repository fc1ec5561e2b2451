"""Contraction: shrink a model step by step to limits of parameters, multiply-adds and milliseconds (TinyViT)."""
