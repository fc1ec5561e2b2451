"""Recipe -> method: a student, its teachers, and what is compared."""

from collections.abc import Sequence

from mmengine.config import Config

from tinymim.distill.method import Method, find_method
from tinymim.errors import ConfigError
from tinymim.models import create_model
from tinymim.models.teachers import Teacher


def build_method(config: Config, *, pretrained: bool = True) -> tuple[Method, Sequence[Teacher]]:
    """The method of a recipe, with its teachers.

    Args:
        config: The recipe.
        pretrained: False for a dry run: teachers may keep random weights.

    Raises:
        TinyMIMError: models that do not fit each other, or a teacher without weights.
    """
    arguments = dict(config.student_args)
    if config.drop_path and "drop_path_rate" not in arguments:
        depth = int(arguments.get("depth", 12))
        arguments["drop_path_rate"] = [float(config.drop_path)] * (depth - 1) + [0.0]
    student = create_model(config.student, img_size=config.img_size, **arguments)
    student.set_grad_checkpointing(bool(config.grad_checkpointing))
    kind = find_method(config.method)
    if not issubclass(kind, Method):
        raise ConfigError(
            f"method {config.method!r} is no method on photos without labels",
            f"'tinymim {kind.verb}' runs it",
            f"tinymim {kind.verb} --recipe NAME",
        )
    method = kind.from_recipe(config, student, pretrained=pretrained)
    return method, method.teachers
