"""Recipe keys: the default of each and the values it may have. Every method declares its own keys."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinymim.errors import ConfigError, did_you_mean

LARGE, DEEP = 1 << 20, 1 << 10  # no number in the arguments of a model is larger, and no number of blocks


@dataclass(frozen=True)
class Key:
    """A recipe key whose value is checked elsewhere, or needs no check.

    Attributes:
        default: Its value if a recipe does not set it.
    """

    default: Any = None

    def check(self, name: str, value: Any) -> None:
        """Raise :class:`~tinymim.errors.ConfigError` for a value that is not allowed."""


@dataclass(frozen=True)
class Kind(Key):
    """A value of certain types, or None.

    Attributes:
        types: The types.
        items: The type of each item, if it is a list.
        words: The types in words.
        example: A valid value, in the syntax of ``--cfg-options``.
    """

    types: tuple[type, ...] = (str,)
    items: type | None = None
    words: str = "a text"
    example: str = "NAME"

    def check(self, name: str, value: Any) -> None:
        fits = value is None or (isinstance(value, self.types) and not isinstance(value, bool))
        if fits and self.items is not None and isinstance(value, list | tuple):
            fits = all(isinstance(item, self.items) for item in value)
        if not fits:
            raise ConfigError(f"{name}={value!r}", f"it must be {self.words}", f"e.g. {name}={self.example}")


@dataclass(frozen=True)
class Table(Key):
    """A dict.

    Attributes:
        keys: Its keys; empty: they are checked elsewhere.
    """

    keys: Mapping[str, Key] = field(default_factory=dict)

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            key = next(iter(self.keys or self.default or {}), "KEY")
            raise ConfigError(
                f"{name}={value!r}", "it must be a dict", f"{name}=dict(...), or --cfg-options {name}.{key}=VALUE"
            )
        for key, item in value.items():
            if self.keys and key not in self.keys:
                raise unknown_key(f"{name}.{key}", [f"{name}.{known}" for known in self.keys], can_be_added=False)
            if self.keys:
                self.keys[key].check(f"{name}.{key}", item)
        check_size(name, value)


@dataclass(frozen=True)
class Choice(Key):
    """One of several values."""

    choices: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> None:
        if value not in self.choices:
            words = ", ".join(map(str, self.choices))
            raise ConfigError(
                f"{name}={value!r}", f"it must be one of {words}", f"--cfg-options {name}={self.choices[-1]}"
            )


@dataclass(frozen=True)
class Number(Key):
    """A number in a range, or None.

    Attributes:
        least: Smallest value.
        most: Largest value.
        whole: Whole numbers only.
        above: The smallest value itself is excluded.
        below: The largest value itself is excluded.
        option: Whether the commands have an option of this name.
        off: Whether False and an empty string mean None.
        word: A word that is allowed, too.
    """

    least: float = 0
    most: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    option: bool = False
    off: bool = False
    word: str | None = None

    def check(self, name: str, value: Any) -> None:
        if value in (None, self.word) or (self.off and not value):
            return
        number = not isinstance(value, bool) and isinstance(value, int if self.whole else int | float)
        if (
            number
            and not (isinstance(value, float) and math.isinf(value))
            and self.least <= value <= self.most
            and not ((self.above and value == self.least) or (self.below and value == self.most))
        ):
            return
        span = f"of at least {self.least}" if math.isinf(self.most) else f"from {self.least} to {self.most}"
        span = "" if math.isinf(self.least) else f" {span}"
        span += f" (not {self.least})" * self.above + f" (not {self.most})" * self.below
        option = f"--{name.replace('_', '-')} N" if self.option else f"--cfg-options {name}=N"
        kind = ("a whole number" if self.whole else "a number") if self.word is None else f"{self.word!r}, or a number"
        raise ConfigError(f"{name}={value!r}", f"it must be {kind}{span}", f"use {option}")


@dataclass(frozen=True)
class Pair(Key):
    """Two numbers.

    Attributes:
        rule: "0 < least <= most <= 1" or "from 0 to below 1".
        example: A valid value, in the syntax of ``--cfg-options``.
    """

    rule: str = ""
    example: str = ""

    def check(self, name: str, value: Any) -> None:
        numbers = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) in (int, float) for n in value)
        rising = self.rule.startswith("0 < least")
        if not numbers or not (0 < value[0] <= value[1] <= 1 if rising else all(0 <= n < 1 for n in value)):
            raise ConfigError(
                f"{name}={value!r}", f"two numbers are needed, {self.rule}", f"--cfg-options {name}={self.example}"
            )


def unknown_key(
    name: str, known: Iterable[str], where: str = "the recipe", *, can_be_added: bool = True
) -> ConfigError:
    """The error for a key that is not known, with the nearest one that is.

    Args:
        name: The dotted key.
        known: The dotted keys of its place.
        where: What the key was given to.
        can_be_added: Whether ``+key`` would help.
    """
    names = sorted(known)
    added = f"to add a new key: --cfg-options +{name}=VALUE" if can_be_added else ""
    return ConfigError(
        f"unknown key {name!r} in {where}",
        f"the keys there are {', '.join(names)}",
        "; ".join(filter(None, [did_you_mean(name, names, ""), added])) or "remove it",
    )


def key_of(parameter: inspect.Parameter) -> Key:
    """The values that a constructor's parameter may have, as far as its annotation or its default tells."""
    wanted, default = parameter.annotation, parameter.default
    if wanted in (int, int | None, float, float | None):
        return Number(least=-math.inf, whole=wanted is int)
    if isinstance(default, bool):
        return Choice(choices=(None, False, True))
    if type(default) in (int, float):
        return Kind(types=(int, float, list, tuple), words="a number, or a list of them", example=str(default))
    return Key()


def check_size(name: str, value: Any) -> None:
    """Refuse numbers in the arguments of a model, at any depth, that no memory holds.

    Args:
        name: Dotted name of the value; one of blocks or layers may be :data:`DEEP`, others :data:`LARGE`.
        value: A number, or lists and dicts of them; others are passed over.

    Raises:
        ConfigError: a larger number.
    """
    most = DEEP if re.search(r"(depths?|layers|blocks|convs|stages)(\.\d+)?$", name) else LARGE
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_size(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        if len(value) > DEEP:
            raise ConfigError(f"{name} has {len(value)} items", f"no model has more than {DEEP}", "shorten it")
        for i, item in enumerate(value):
            check_size(f"{name}.{i}", item)
    elif isinstance(value, int | float) and not value <= most:
        raise ConfigError(f"{name}={value}", f"no model has more than {most} of these", "choose a smaller number")


def defaults(keys: Mapping[str, Key]) -> dict[str, Any]:
    """Key -> default."""
    return {name: key.default for name, key in keys.items()}
