"""Recipe keys: the default of each and the values it may have. Every method declares its own keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinymim.errors import ConfigError


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
    """

    least: float = 0
    most: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    option: bool = False
    off: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None or (self.off and not value):
            return
        number = not isinstance(value, bool) and isinstance(value, int if self.whole else int | float)
        if (
            number
            and self.least <= value <= self.most
            and not ((self.above and value == self.least) or (self.below and value == self.most))
        ):
            return
        span = f"of at least {self.least}" if math.isinf(self.most) else f"from {self.least} to {self.most}"
        span += f" (not {self.least})" * self.above + f" (not {self.most})" * self.below
        option = f"--{name.replace('_', '-')} N" if self.option else f"--cfg-options {name}=N"
        raise ConfigError(f"{name}={value!r}", f"it must be a number {span}", f"use {option}")


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


def defaults(keys: Mapping[str, Key]) -> dict[str, Any]:
    """Key -> default."""
    return {name: key.default for name, key in keys.items()}
