"""Limits of a search, as people write them: 5.4M parameters, 1.3G multiply-adds, 15ms. No torch."""

import math
import re
from dataclasses import asdict, dataclass

from tinymim.errors import ConfigError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
TIMES = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3}


def amount(text: str, option: str, *, time: bool = False) -> float:
    """A number with a unit: ``5.4M``, ``1.3G``, ``5400000``; of a time ``15ms``, ``0.015s``, ``15``.

    Args:
        text: As typed.
        option: Of the command, for the error.
        time: Whether it is a time; the result is then in milliseconds.

    Raises:
        ConfigError: no such number.
    """
    units = TIMES if time else UNITS
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower().replace(",", "").replace("_", ""))
    value = float(found[1]) * units.get(found[2], math.nan) if found else math.nan
    if not 0 < value < math.inf:
        what = "milliseconds: 15ms or 0.015s" if time else "a number with k, M or G, or without: 5.4M, 1.3G or 5400000"
        raise ConfigError(
            f"{option} {text}", f"it is not above 0 in {what}", f"e.g. {option} {'15ms' if time else '5.4M'}"
        )
    return value


def in_words(count: float) -> str:
    """A count in millions or billions: ``5.4 M``, ``1.3 G``."""
    return f"{count / 1e9:.4g} G" if count >= 1e8 else f"{count / 1e6:.4g} M"


@dataclass(frozen=True)
class Limits:
    """What a model must come down to; None: no limit.

    Attributes:
        params: Parameters.
        macs: Multiply-adds of one image.
        latency_ms: Milliseconds of one image, measured.
    """

    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None

    def over(self, params: float, macs: float, latency_ms: float | None = None) -> dict[str, float]:
        """Limits that do not hold -> the natural logarithm of how many times too large the model is."""
        values = {"params": params, "macs": macs, "latency_ms": latency_ms}
        found = {}
        for name, limit in asdict(self).items():
            value = values[name]
            if limit is not None and value is not None and value > limit:
                found[name] = math.log(value / limit)
        return found

    def __str__(self) -> str:
        words = {
            "parameters": None if self.params is None else in_words(self.params),
            "multiply-adds": None if self.macs is None else in_words(self.macs),
            "milliseconds": None if self.latency_ms is None else f"{self.latency_ms:.4g}",
        }
        return ", ".join(f"{value} {name}" for name, value in words.items() if value is not None)
