"""One opened .onnx file on one runtime: what is scored is what is timed. Here: the contract, the registry, the door.

A runtime is a subclass of :class:`Engine` in a file of its own. It says its name, its providers and compute types, and
how a file is opened, run, timed and profiled. A runtime imports its package, and numpy, when a file is opened: the
options of the commands read the registry.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from tinymim.errors import ConfigError, DataError
from tinymim.files import cores, sha256_file
from tinymim_export.runtime.metadata import check_verified
from tinymim_export.runtime.providers import Provider

if TYPE_CHECKING:
    import numpy as np

DEFAULT = "onnxruntime"  # the runtime where none is named
DTYPES = ("float32", "uint8")  # of images: normalised, or pixels
RUNTIMES: dict[str, type[Engine]] = {}  # word of --runtime -> its engine, in the order of registration
EngineClass = TypeVar("EngineClass", bound="type[Engine]")
Result = TypeVar("Result")


class Port(NamedTuple):
    """An input or output of a file."""

    name: str
    dtype: str  # numpy's word: "float32", "uint8", "int64"
    shape: tuple[int | str | None, ...]  # a name or None where a side is free

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


class Engine(ABC):
    """A file opened on one runtime; nothing falls back to another one silently.

    A subclass sets the first five attributes, opens the file in ``__init__`` and hands inputs, outputs and metadata to
    :meth:`describe`.

    Attributes:
        runtime: Word of ``--runtime``.
        title: Its name in sentences.
        providers: Where it computes; the first is the default.
        compute_types: What it can compute in instead of the file's own number format, the default first. Empty: it
            computes in the precision of the file.
        packages: Distributions whose versions decide its speed.
        takes_onnx: Whether it opens .onnx files; ``--tune`` tries it only then.
        path: The .onnx file.
        sha256: Of the file.
        meta: Its ``tinymim.*`` metadata; empty for files of others.
        verified: See :func:`tinymim_export.runtime.metadata.check_verified`.
        provider: Word of ``--provider``.
        compute_type: One of ``compute_types``, or None.
        threads: CPU threads.
        input: Name of its input.
        dtype: Of its input: float32 (normalised) or uint8 (pixels).
        given: Batch, channels, height and width fixed in the file, None where free.
        size: Height and width fixed in the file, None where free.
        outputs: All outputs.
        output: Name of the first one.
    """

    runtime: ClassVar[str]
    title: ClassVar[str]
    providers: ClassVar[tuple[Provider, ...]]
    compute_types: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    takes_onnx: ClassVar[bool] = True

    def __init__(self, path: Path, provider: str, compute_type: str | None, threads: int) -> None:
        self.path, self.provider, self.compute_type, self.threads = path, provider, compute_type, threads

    def describe(self, inputs: Sequence[Port], outputs: Sequence[Port], meta: dict[str, Any]) -> None:
        """Take in what the opened file says of itself.

        Raises:
            ConfigError: it does not take one batch of images.
        """
        import numpy as np

        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].dtype not in DTYPES:
            raise ConfigError(
                f"{self.path.name} does not take one image batch",
                "its inputs are " + ", ".join(map(str, inputs)),
                f"follow or score a tracker: tinymim track --test {self.path} --data SEQUENCES"
                if {port.name for port in inputs} == {"template", "search"}
                else "use a file written by tinymim-export",
            )
        self.sha256, self.meta = sha256_file(self.path), meta
        self.verified = check_verified(self.path, meta)
        self.input, self.dtype = inputs[0].name, np.dtype(inputs[0].dtype)
        self.given = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)
        self.size = self.given[2:]
        self.outputs, self.output = tuple(outputs), outputs[0].name

    @classmethod
    @abstractmethod
    def require(cls, provider: str, compute_type: str | None) -> None:
        """Raise :class:`ConfigError` where this machine lacks the runtime, the provider or the compute type."""

    @classmethod
    def find_provider(cls, name: str) -> Provider:
        """A provider by its word.

        Raises:
            ConfigError: this runtime has no such provider.
        """
        found = next((provider for provider in cls.providers if provider.name == name), None)
        if found is not None:
            return found
        if len(cls.providers) == 1:
            only = f"we run it on the {cls.providers[0].name.upper()}"
            raise ConfigError(f"{cls.title} has no provider {name!r}", only, "leave --provider out")
        known = ", ".join(provider.name for provider in cls.providers)
        raise ConfigError(f"provider {name!r} is unknown", f"known: {known}", "choose one of them")

    @property
    def place(self) -> Provider:
        """Where it computes."""
        return self.find_provider(self.provider)

    @property
    def label(self) -> str:
        """Runtime, provider and compute type in words, e.g. "openvino cpu bf16"."""
        return engine_label(self.runtime, self.provider, self.compute_type)

    def run(self, images_N3HW: np.ndarray) -> np.ndarray:
        """The first output for a batch: float32 normalised, or uint8 pixels where the metadata's ``input`` says so.

        Raises:
            ConfigError: the graph cannot take this size.
        """
        import numpy as np

        sides = zip(self.size, images_N3HW.shape[2:], strict=True)
        if any(fixed not in (None, side) for fixed, side in sides):
            raise cannot_run(self.path, images_N3HW.shape, self.size, "another size")
        try:
            return self._run(np.ascontiguousarray(images_N3HW, self.dtype))
        except Exception as error:  # the runtimes raise several kinds
            raise cannot_run(self.path, images_N3HW.shape, self.size, error) from error

    def shape(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
        """The shape to run at: the file's fixed sides, else ``batch`` and ``size``, else the size of its export.

        Raises:
            ConfigError: another size than the file's, or a free one that nothing names.
        """
        traced = (self.meta.get("cost") or {}).get("size") or (None, None)
        wanted = (batch, 3, *(size or (fixed or side for fixed, side in zip(self.size, traced, strict=True))))
        out = []
        for name, have, want in zip(("batch", "channels", "height", "width"), self.given, wanted, strict=True):
            if have is not None and want not in (None, have):
                raise ConfigError(
                    f"{self.path.name} has a fixed {name} of {have}, not {want}",
                    "it was exported that way",
                    f"leave --{'batch' if name == 'batch' else 'size'} out, or export again with --dynamic",
                )
            side = want if have is None else have
            if side is None:
                raise ConfigError(f"the {name} of {self.path.name} is free", "any size runs", "add --size H W")
            if side < 1:
                raise ConfigError(f"{name} {side} is not possible", "sizes are whole pixels", "e.g. --size 512 512")
            out.append(int(side))
        return (out[0], out[1], out[2], out[3])

    def some_shape(self) -> tuple[int, int, int, int]:
        """A shape the file takes, for looking at its graph only."""
        free = any(side is None for side in self.size) and not self.meta.get("cost")
        return self.shape(self.given[0] or 1, (64, 64) if free else None)

    @abstractmethod
    def _run(self, images_N3HW: np.ndarray) -> np.ndarray:
        """The first output for a batch that fits."""

    @abstractmethod
    def timer(self, shape: tuple[int, ...], seed: int = 0) -> Callable[[], float]:
        """A function that runs once on a random input held on the device and returns milliseconds.

        Raises:
            ConfigError: the graph cannot take this shape.
        """

    @abstractmethod
    def placement(self) -> dict[str, Counter[str]]:
        """Title of a provider -> operators it runs.

        Raises:
            CheckFailed: work that matters runs on another provider than the requested one.
        """

    @abstractmethod
    def operator_times(self, shape: tuple[int, ...], runs: int) -> Counter[str]:
        """Kind of operator -> milliseconds of one run, from the runtime's own profile of ``runs`` runs."""

    @abstractmethod
    def unfused_pairs(self) -> int | None:
        """Quantised tensors that go straight back to float after the runtime's optimisation; None: it cannot say."""


def register_runtime(engine: EngineClass) -> EngineClass:
    """Class decorator: the engine becomes a choice of ``--runtime``, and its providers targets of ``--tune``.

    Raises:
        ConfigError: the name is taken.
    """
    if engine.runtime in RUNTIMES:
        raise ConfigError(
            f"runtime {engine.runtime!r} is registered already", f"by {RUNTIMES[engine.runtime]}", "choose another name"
        )
    RUNTIMES[engine.runtime] = engine
    return engine


def engine_label(runtime: str, provider: str, compute_type: str | None) -> str:
    """The three in words: "onnxruntime cpu", "openvino cpu bf16"."""
    return " ".join(filter(None, (runtime, provider, compute_type)))


def provider_names() -> list[str]:
    """Words of ``--provider`` over all runtimes."""
    return list(dict.fromkeys(provider.name for engine in RUNTIMES.values() for provider in engine.providers))


def provider_word(title: str) -> str:
    """The word of ``--provider`` for a provider's title in a result; an unknown title stays as it is."""
    found = (p.name for engine in RUNTIMES.values() for p in engine.providers if p.title == title)
    return next(found, title)


def compute_types() -> list[str]:
    """Compute types over all runtimes."""
    return list(dict.fromkeys(word for engine in RUNTIMES.values() for word in engine.compute_types))


def packages() -> list[str]:
    """Distributions whose versions decide the speed, over all runtimes."""
    return list(dict.fromkeys(name for engine in RUNTIMES.values() for name in engine.packages))


def renamed(**new_names: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: a function also takes its keywords under the names they had in 0.1."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Result:
            for old, new in new_names.items():
                if old in options:
                    if new in options:
                        raise TypeError(f"{function.__name__}() got both {new} and {old}, its name in 0.1")
                    options[new] = options.pop(old)
            return function(*args, **options)

        return wrapper

    return decorate


def availability(engine: type[Engine]) -> dict[str, str]:
    """Runtime and provider -> "here" with its compute types, or "no" with the reason; for ``tinymim doctor``."""
    found = {}
    for provider in engine.providers:
        able, why = [], ""
        for word in engine.compute_types or (None,):
            try:
                engine.require(provider.name, word)
                able.append(word)
            except ConfigError as error:
                why = error.what
        words = " ".join(filter(None, able))
        found[engine_label(engine.runtime, provider.name, None)] = f"here {words}".strip() if able else f"no ({why})"
    return found


@renamed(precision="compute_type")
def open_engine(
    path: str | Path,
    *,
    runtime: str = DEFAULT,
    provider: str = "cpu",
    compute_type: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open a file.

    Args:
        path: The .onnx file.
        runtime: One of :data:`RUNTIMES`: "onnxruntime", "openvino".
        provider: Of the runtime: "cpu", "cuda" or "tensorrt".
        compute_type: What OpenVINO computes in: "f32" (default) or "bf16". ``--precision`` on the command line, and
            ``precision`` in 0.1.
        threads: CPU threads; None takes every core this process may use.

    Raises:
        ConfigError: runtime, provider or compute type that is not here or do not belong together.
        DataError: missing or damaged file.
    """
    path = Path(path)
    engine = find_runtime(runtime)
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads} is not possible", "at least one computes", "leave it out: every core")
    if compute_type is not None and not engine.compute_types:
        raise no_compute_type(compute_type, engine)
    engine.find_provider(provider)
    if compute_type not in (None, *engine.compute_types):
        raise ConfigError(
            f"precision {compute_type!r} is unknown",
            f"{engine.title} takes {', '.join(engine.compute_types)}",
            "choose one",
        )
    compute_type = compute_type or next(iter(engine.compute_types), None)
    engine.require(provider, compute_type)
    if not path.is_file():
        raise DataError(f"no file at {path}", "it does not exist", "check the path")
    return engine(path, provider, compute_type, threads or cores())


def find_runtime(name: str) -> type[Engine]:
    """A runtime by its word.

    Raises:
        ConfigError: unknown.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"runtime {name!r} is unknown", f"known: {', '.join(RUNTIMES)}", "choose one of them")
    return RUNTIMES[name]


def no_compute_type(given: str, engine: type[Engine]) -> ConfigError:
    """The error for ``--precision`` with a runtime that computes in the precision of the file."""
    able = [other for other in RUNTIMES.values() if other.compute_types]
    return ConfigError(
        f"--precision {given} is a setting of {' and '.join(other.title for other in able)}",
        f"{engine.title} computes in the precision of the file",
        f"add --runtime {' or '.join(other.runtime for other in able)}, or export the precision: "
        "tinymim-export --precision int8",
    )


def random_input(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Normal float32 noise, or uniform uint8 pixels."""
    import numpy as np

    random = np.random.default_rng(seed)
    if np.dtype(dtype) == np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape).astype(np.float32)


def cannot_run(path: Path, shape: tuple[int, ...], size: tuple[int | None, ...], error: object) -> Exception:
    """The error for an input the graph does not take."""
    text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    fixed = "x".join("any" if side is None else str(side) for side in size)
    if isinstance(error, ConfigError | DataError):
        return error
    return ConfigError(
        f"{path.name} cannot run an input of {'x'.join(map(str, shape))}",
        f"its height and width are {fixed} ({text})",
        "use the size it was exported at, or export again with --dynamic",
    )
