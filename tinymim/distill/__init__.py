"""Training methods: what is read from student and teacher, and how it is compared."""

from tinymim.distill.d2mae import D2MAE
from tinymim.distill.dmae import DMAE
from tinymim.distill.fast_distill import FastDistill
from tinymim.distill.features import class_token_kl, feature_loss, whiten
from tinymim.distill.hiera_mae import HieraDMAE
from tinymim.distill.mae import MaskedPretraining
from tinymim.distill.method import METHODS, Method, register_method
from tinymim.distill.relations import relation_kl, relation_logits, relation_losses, relation_smooth_l1
from tinymim.distill.several import SeveralTeachers
from tinymim.distill.simmim import D2SimMIM
from tinymim.distill.sources import LiveTeacher, TargetSource
from tinymim.distill.taps import qkv_at, read
from tinymim.distill.targets import Target, parse_target
from tinymim.distill.tinymim import TinyMIM
from tinymim.lazy import import_all
from tinymim.store.targets import TargetStore

__all__ = [
    "D2MAE",
    "DMAE",
    "METHODS",
    "D2SimMIM",
    "FastDistill",
    "HieraDMAE",
    "LiveTeacher",
    "MaskedPretraining",
    "Method",
    "SeveralTeachers",
    "Target",
    "TargetSource",
    "TargetStore",
    "TinyMIM",
    "class_token_kl",
    "feature_loss",
    "parse_target",
    "qkv_at",
    "read",
    "register_method",
    "relation_kl",
    "relation_logits",
    "relation_losses",
    "relation_smooth_l1",
    "whiten",
]

import_all(__name__)  # methods register
