"""What to read from student and teacher, and how to compare."""

from tinymim.distill.methods import TinyMIM
from tinymim.distill.relations import relation_kl, relation_logits, relation_losses
from tinymim.distill.taps import qkv_at

__all__ = ["TinyMIM", "qkv_at", "relation_kl", "relation_logits", "relation_losses"]
