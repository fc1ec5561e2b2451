"""Where candidates can run, read from the registries of runtimes and precisions."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from tinymim.errors import ConfigError
from tinymim_export.precision.base import PRECISIONS
from tinymim_export.runtime.engines.base import RUNTIMES, Engine, engine_label, open_engine


@dataclass(frozen=True)
class Target:
    """Where a file can run, and which precisions of the file (besides fp32) make sense there."""

    runtime: str
    provider: str
    compute_type: str | None  # of OpenVINO
    precisions: tuple[str, ...]

    @property
    def engine(self) -> str:
        """As :attr:`tinymim_export.runtime.engines.Engine.label`."""
        return engine_label(self.runtime, self.provider, self.compute_type)

    def open(self, path: Path, threads: int) -> Engine:
        """Open a file there."""
        return open_engine(
            path, runtime=self.runtime, provider=self.provider, compute_type=self.compute_type, threads=threads
        )


def targets() -> dict[str, tuple[Target, ...]]:
    """Word of ``--runtimes`` -> one target for each compute type.

    The first provider of every runtime comes first, then the others: the first target of all is the baseline.
    """
    pairs = [[(engine, provider) for provider in engine.providers] for engine in RUNTIMES.values() if engine.takes_onnx]
    found: dict[str, tuple[Target, ...]] = {}
    for engine, provider in (pair for rank in zip_longest(*pairs) for pair in rank if pair is not None):
        place = engine_label(engine.runtime, provider.name, None)
        precisions = tuple(
            name for name, kind in PRECISIONS.items() if place in kind.targets or name in provider.precisions
        )
        found[provider.target] = tuple(
            Target(engine.runtime, provider.name, word, precisions) for word in engine.compute_types or (None,)
        )
    return found


def milliseconds(text: str) -> float:
    """``100``, ``100ms`` or ``0.1s`` as milliseconds.

    Raises:
        ConfigError: no positive time.
    """
    number, factor = text.strip().lower(), 1.0
    if number.endswith("ms"):
        number = number[:-2]
    elif number.endswith("s"):
        number, factor = number[:-1], 1000.0
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--latency-budget {text} is not a time", "it is milliseconds of one image", "e.g. 100ms")
    return value
