"""Build the method of a recipe: a student, its teachers, and what is compared."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config

from tinymim.distill.method import Method, find_method
from tinymim.engine.cost import check_memory
from tinymim.errors import ConfigError
from tinymim.models import create_model
from tinymim.models.teachers import Teacher


def student_outline(config: Config) -> Any:
    """A recipe's student without weights (on the meta device): depth, stages, widths.

    Raises:
        ConfigError: see :func:`tinymim.create_model`.
    """
    with torch.device("meta"):
        return create_model(config.student, img_size=config.img_size, **config.student_args)


def build_method(config: Config, *, pretrained: bool = True) -> tuple[Method, Sequence[Teacher]]:
    """The method of a recipe, with its teachers.

    Args:
        config: The recipe.
        pretrained: False for a dry run: teachers may keep random weights.

    Raises:
        TinyMIMError: models that do not fit each other, or a teacher without weights.
    """
    arguments, rate = dict(config.student_args), float(config.drop_path)
    outline = student_outline(config)
    check_memory(outline)
    if rate and "drop_path_rate" not in arguments:
        # one stage: a constant rate except for the last block, as published
        arguments["drop_path_rate"] = [rate] * (outline.depth - 1) + [0.0] if len(outline.stage_info) == 1 else rate
    student = create_model(config.student, img_size=config.img_size, **arguments)
    student.set_grad_checkpointing(bool(config.grad_checkpointing))
    kind = find_method(config.method)
    if not issubclass(kind, Method):
        raise ConfigError(
            f"method {config.method!r} does not train on photos without labels",
            f"'tinymim {kind.verb}' runs it",
            f"tinymim {kind.verb} --recipe NAME",
        )
    method = kind.from_recipe(config, student, pretrained=pretrained)
    return method, method.teachers
