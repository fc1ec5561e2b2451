"""What to read from student and teacher, and how to compare."""

from tinymim.distill.features import class_token_kl, feature_loss, whiten
from tinymim.distill.methods import TinyMIM
from tinymim.distill.relations import relation_kl, relation_logits, relation_losses, relation_smooth_l1
from tinymim.distill.several import SeveralTeachers
from tinymim.distill.taps import qkv_at, read
from tinymim.distill.targets import Target, parse_target

__all__ = [
    "SeveralTeachers",
    "Target",
    "TinyMIM",
    "class_token_kl",
    "feature_loss",
    "parse_target",
    "qkv_at",
    "read",
    "relation_kl",
    "relation_logits",
    "relation_losses",
    "relation_smooth_l1",
    "whiten",
]
