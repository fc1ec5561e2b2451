"""Vision transformers, teachers, and one reader for every checkpoint format."""

from tinymim.lazy import import_all
from tinymim.models.backbone import Backbone, Stage, register_backbone
from tinymim.models.checkpoints import (
    Checkpoint,
    LoadReport,
    load_weights,
    model_from_checkpoint,
    read_checkpoint,
    save_student,
)
from tinymim.models.registry import create_model, model_names
from tinymim.models.vit import ViT

__all__ = [
    "Backbone",
    "Checkpoint",
    "LoadReport",
    "Stage",
    "ViT",
    "create_model",
    "load_weights",
    "model_from_checkpoint",
    "model_names",
    "read_checkpoint",
    "register_backbone",
    "save_student",
]

import_all(__name__)  # backbones and teachers register
