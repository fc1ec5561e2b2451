"""What a training method is, and the registry of methods: adding one is writing one file.

A method names its losses and defines everything else a run needs from it: the recipe keys it adds, the command that
runs it, how it is built from a recipe, what of it is kept. See ``tinymim/distill/tinymim.py`` for a full example.

    @register_method("my_method", verb="distill", title="distil")
    class MyMethod(Method):
        keys = {"temperature": Number(1.0, above=True)}

        @classmethod
        def from_recipe(cls, recipe, student, *, pretrained=True): ...

        def losses(self, images): return {"loss": ...}

Its recipe sets ``method = "my_method"`` and, if the file is not part of the package,
``custom_imports = dict(imports=["my_module"])``.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tinymim.distill.recipe_keys import Key
from tinymim.errors import ConfigError
from tinymim.models.checkpoints import load_weights, save_student
from tinymim.models.teachers import Teacher
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

Normalisation = tuple[
    Sequence[float], Sequence[float]
]  # mean and standard deviation of each channel, for values in 0..1
PerPhoto = Callable[[Path, int], Mapping[str, Tensor]]  # (photo, epoch) -> tensors of that photo


class Registered(Protocol):
    """The class attributes of everything that a recipe's ``method`` can name."""

    name: ClassVar[str]
    verb: ClassVar[str]  # the command that runs it
    title: ClassVar[str]  # start of the progress line
    base: ClassVar[str]  # recipe file with the defaults of the keys that every run has
    keys: ClassVar[Mapping[str, Key]]  # the recipe keys it adds


METHODS: dict[str, type[Registered]] = {}
Kind = TypeVar("Kind", bound=type[Any])


def renormalisation(normalisation: Normalisation | None) -> Tensor:
    """Scale and shift, (2, 1, 3, 1, 1), from images normalised for the student to the teacher's; None: ImageNet's."""
    (mean, std), (mean_t, std_t) = (IMAGENET_MEAN, IMAGENET_STD), normalisation or (IMAGENET_MEAN, IMAGENET_STD)
    change = [(s / t, (m - n) / t) for m, s, n, t in zip(mean, std, mean_t, std_t, strict=True)]
    return torch.tensor(change).T.reshape(2, 1, 3, 1, 1)


def register_method(name: str, *, verb: str, title: str, base: str = "_base.py") -> Callable[[Kind], Kind]:
    """Decorator: register a class under the name that recipes use.

    Args:
        name: The recipe's ``method``.
        verb: The command that runs it: "pretrain" or "distill" for a :class:`Method`.
        title: Start of the progress line, e.g. "distil".
        base: File of ``tinymim/recipes`` with the defaults of the keys that every run has.

    Raises:
        ConfigError: another class has this name.
    """

    def register(kind: Kind) -> Kind:
        known = METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(
                f"two methods are called {name!r}",
                f"{known.__module__}.{known.__qualname__} already has this name",
                "register yours under another name",
            )
        kind.name, kind.verb, kind.title, kind.base = name, verb, title, base
        METHODS[name] = kind
        return kind

    return register


def find_method(name: Any) -> type[Registered]:
    """The class that a recipe's ``method`` names.

    Raises:
        ConfigError: no method has this name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"method={name!r}",
            f"it must be one of {', '.join(METHODS)}",
            "correct the recipe; to import your own method, add custom_imports = dict(imports=['MODULE'])",
        )
    return METHODS[name]


class Method(nn.Module):
    """A student, what it is compared with, and a dict of named losses.

    Subclasses implement :meth:`from_recipe` and :meth:`losses`, set ``student``, and override what differs.

    Attributes:
        student: The network that is kept.
        teachers: The frozen models that the targets come from, for the records; empty if there are none.
        calibrates: Whether :meth:`calibrate` needs to be called.
        augmentation: Arguments of :class:`tinymim.data.replay.Replay`: the training views are made by it, from seeds.
            None: the run's own random crops and colour jitter.
        recoloured: With ``augmentation``, whether the student's copy has a colour jitter of its own: the targets are
            those of the plain view.
        stored: With ``augmentation``, the seeds and targets of photos (:class:`tinymim.data.replayed.Targets`); its
            ``check(keys, epochs)`` refuses photos that it does not have, ``example()`` is for measuring. The targets
            arrive as ``extra`` of :meth:`losses`. None: seeds that follow from the run's.
        per_photo: Called by the data workers for each photo; returns tensors that the method needs besides the pixels
            (e.g. targets from a store). They arrive, stacked, as ``extra`` of :meth:`losses`. None: no extra tensors.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[str]
    keys: ClassVar[Mapping[str, Key]] = {}

    student: Any
    teachers: Sequence[Teacher] = ()
    per_photo: PerPhoto | None = None
    calibrates = False
    augmentation: Mapping[str, Any] | None = None
    recoloured = False
    stored: Any = None

    @classmethod
    def from_recipe(cls, recipe: Any, student: Any, *, pretrained: bool = True) -> "Method":
        """Build the method.

        Args:
            recipe: Every key of the recipe, as attributes.
            student: The recipe's student, already built.
            pretrained: False for a dry run: teachers may keep random weights.

        Raises:
            TinyMIMError: models that do not fit each other, or a teacher without weights.
        """
        raise NotImplementedError

    def losses(self, *views: Tensor) -> dict[str, Tensor]:
        """Named scalars; ``loss`` is the one that is minimised.

        Args:
            views: The student's images, then each teacher's, in the order of :attr:`normalisations`; (B, 3, H, W) each.

        A method that sets :attr:`per_photo` also takes the keyword ``extra``: name -> (B, ...).
        """
        raise NotImplementedError

    def forward(self, *views: Tensor, **extra: Any) -> dict[str, Tensor]:
        """Same as :meth:`losses`."""
        return self.losses(*views, **extra)

    def calibrate(self, dtype: torch.dtype, *views: Tensor) -> None:
        """Called once, before :meth:`prepare`, with some of the photos if :attr:`calibrates` is set.

        Args:
            dtype: See :meth:`prepare`.
            views: See :meth:`losses`.
        """

    def prepare(self, dtype: torch.dtype) -> None:
        """Called once, when the method is on its device: make what is frozen fast.

        Args:
            dtype: The type of autocast in this run; float32 without.
        """

    def example(self, photo: Path | None) -> Mapping[str, Tensor]:
        """The tensors that a photo adds to ``extra``, for measuring memory and time.

        Args:
            photo: One of the photos, or None.
        """
        if self.stored is not None:
            given: Mapping[str, Tensor] = self.stored.example()
            return given
        return {} if self.per_photo is None or photo is None else self.per_photo(photo, 0)

    @property
    def kept(self) -> nn.Module:
        """The network that is saved: the student, or one that the student is part of."""
        return self.student

    def start_from(self, file: str | os.PathLike[str]) -> None:
        """Initialise what is saved from a checkpoint (``--init-from``).

        Raises:
            CheckpointError: it does not fit.
        """
        load_weights(self.student, file)

    def save(self, network: Any, path: Path, meta: dict[str, Any]) -> None:
        """Write :attr:`kept`, given with whole weights, and what is known of it."""
        save_student(network, path, meta)

    def undecayed(self) -> Iterable[str]:
        """Names, or last parts of names, of parameters of more than one dimension without weight decay."""
        return ()

    @property
    def learned(self) -> nn.Module:
        """Everything a checkpoint must hold to resume: never a teacher."""
        return self.student

    @property
    def normalisations(self) -> list[Normalisation]:
        """The normalisation of each view: the student's, then each live teacher's."""
        live = [teacher for teacher in self.teachers if isinstance(teacher, Teacher)]
        return [(IMAGENET_MEAN, IMAGENET_STD), *((teacher.mean, teacher.std) for teacher in live)]

    def relation_pairs(self, views: Sequence[Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
        """For metrics per relation head: (prefix of the loss names, method of one teacher, that teacher's images)."""
        return iter(())

    def learned_relations(self) -> tuple[int, int] | None:
        """Student block and heads of the relations that the student learned, for runs it will teach; None: none."""
        return None
