"""What a training method is, and the registry of methods: adding one is writing one file.

A method names its losses; everything else a run needs of it, it says of itself: the recipe keys it adds, the command
that runs it, how it is built from a recipe, what of it is kept. See ``tinymim/distill/tinymim.py`` for a whole one.

    @register_method("my_method", verb="distill", title="distil")
    class MyMethod(Method):
        keys = {"temperature": Number(1.0, above=True)}

        @classmethod
        def from_recipe(cls, recipe, student, *, pretrained=True): ...

        def losses(self, images): return {"loss": ...}

A recipe of it says ``method = "my_method"`` and, where the file is not part of the package,
``custom_imports = dict(imports=["my_module"])``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from tinymim.distill.recipe_keys import Key
from tinymim.errors import ConfigError
from tinymim.models.teachers import Teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

Normalisation = tuple[
    Sequence[float], Sequence[float]
]  # mean and standard deviation of each channel, of values in 0..1
PerPhoto = Callable[[Path, int], Mapping[str, Tensor]]  # (photo, epoch) -> tensors of that photo


class Registered(Protocol):
    """What the registry knows of whatever a recipe's word ``method`` stands for."""

    name: ClassVar[str]
    verb: ClassVar[str]  # the command that runs it
    title: ClassVar[str]  # start of the live line
    base: ClassVar[str]  # recipe file with the defaults of the keys every run has
    keys: ClassVar[Mapping[str, Key]]  # the recipe keys it adds


METHODS: dict[str, type[Registered]] = {}
Kind = TypeVar("Kind", bound=type[Any])


def register_method(name: str, *, verb: str, title: str, base: str = "_base.py") -> Callable[[Kind], Kind]:
    """Enter a class under the word that recipes use.

    Args:
        name: The recipe's ``method``.
        verb: The command that runs it: "pretrain" or "distill" for a :class:`Method`.
        title: Start of the live line, e.g. "distil".
        base: File of ``tinymim/recipes`` with the defaults of the keys every run has.

    Raises:
        ConfigError: another class has this name.
    """

    def register(kind: Kind) -> Kind:
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(
                f"two methods are called {name!r}",
                f"{known.__module__}.{known.__qualname__} has the name already",
                "register yours under another one",
            )
        kind.name, kind.verb, kind.title, kind.base = name, verb, title, base
        METHODS[name] = kind
        return kind

    return register


def find_method(name: Any) -> type[Registered]:
    """The class behind a recipe's ``method``.

    Raises:
        ConfigError: no method has this name.
    """
    if name not in METHODS:
        raise ConfigError(
            f"method={name!r}",
            f"it must be one of {', '.join(METHODS)}",
            "correct the recipe; a method of yours is imported by custom_imports = dict(imports=['MODULE'])",
        )
    return METHODS[name]


class Method(nn.Module):
    """A student, what it is compared with, and a dict of named losses.

    Subclasses write :meth:`from_recipe` and :meth:`losses`, set ``student``, and override what differs.

    Attributes:
        student: The network that is kept.
        teachers: The frozen models the targets come from, for the records; empty where there are none.
        per_photo: Called by the data workers for each photo: tensors that the method wants beside the pixels
            (targets from a store, say). They arrive, stacked, as ``extra`` of :meth:`losses`. None: nothing more.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[str]
    keys: ClassVar[Mapping[str, Key]] = {}

    student: Any
    teachers: Sequence[Teacher] = ()
    per_photo: PerPhoto | None = None

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "Method":
        """Build the method.

        Args:
            recipe: Every key with its value, as attributes.
            student: The recipe's student, built.
            pretrained: False for a dry run: teachers may keep random weights.

        Raises:
            TinyMIMError: models that do not fit each other, or a teacher without weights.
        """
        raise NotImplementedError

    def losses(self, *views: Tensor) -> dict[str, Tensor]:
        """Named scalars, among them ``loss``.

        Args:
            views: (B, 3, H, W) each: the student's images, then those of each of :attr:`normalisations` after it.

        A method that sets :attr:`per_photo` also takes the keyword ``extra``: name -> (B, ...).
        """
        raise NotImplementedError

    def forward(self, *views: Tensor, **extra: Any) -> dict[str, Tensor]:
        """Same as :meth:`losses`."""
        return self.losses(*views, **extra)

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to go on: never a teacher."""
        return self.student

    @property
    def normalisations(self) -> list[Normalisation]:
        """Of every view: the student's, then each teacher's."""
        return [(IMAGENET_MEAN, IMAGENET_STD), *((teacher.mean, teacher.std) for teacher in self.teachers)]

    def relation_pairs(self, views: Sequence[Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
        """For the records of a run: (start of the losses' names, method of one teacher, that teacher's images)."""
        return iter(())

    def learned_relations(self) -> tuple[int, int] | None:
        """Student block and heads of the relations the student learned, for the runs it will teach; None: none."""
        return None
