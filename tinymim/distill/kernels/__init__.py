"""Triton kernels; each module is imported only where it runs (Triton is not on every machine)."""
