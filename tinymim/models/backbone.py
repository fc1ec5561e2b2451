"""The contract of a backbone, so that code outside this folder never checks which kind it is; and the registry.

A backbone is one file: a class that implements :class:`Backbone`, decorated with :func:`register_backbone`. timm's
conventions are followed wherever timm has one: ``forward_intermediates``, ``group_matcher``, ``no_weight_decay``.

Legend: B = batch, D = width, H, W = image height and width in pixels.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from tinymim.errors import ConfigError

QKV = ("q", "k", "v")
TAPS = ("input", *QKV, "attn_pre", "attn_post", "ffn_pre", "output")  # what can be read from a block, in this order


class Stage(NamedTuple):
    """Consecutive blocks of the same width on the same grid.

    Attributes:
        width: Channels D of its maps.
        stride: Pixels per grid cell.
        blocks: Its blocks, numbered from 0 through the whole model.
        taps: Its indices in ``forward_intermediates``: block numbers in a plain model, the stage number in a
            hierarchical one.
    """

    width: int
    stride: int
    blocks: range
    taps: range


@runtime_checkable
class Backbone(Protocol):
    """The contract. Images are normalised and of any height and width; maps are ceil(H / stride) x ceil(W / stride).

    Attributes:
        config: Constructor arguments as plain values: :func:`from_config` builds the same model again.
        must_match: Keys of ``config`` on which a weight file and a model must agree.
        img_size: Height and width (pixels) the model was built for.
        depth: Number of blocks; layers for layer decay go from 0 (stem) to depth + 1 (everything after the blocks).
        num_prefix_tokens: Tokens before the patches.
        stage_info: The stages, finest first. (Not named ``stages``: models have modules of that name.)
    """

    config: dict[str, Any]
    must_match: tuple[str, ...]
    img_size: tuple[int, int]
    depth: int
    num_prefix_tokens: int

    @property
    def stage_info(self) -> tuple[Stage, ...]:
        """See :class:`Stage`."""

    @property
    def forward_intermediates(self) -> Callable[..., Any]:
        """Taps, with timm's meaning: ``indices``, ``stop_early``, ``output_fmt``, ``intermediates_only``."""

    def forward_map(self, images: Tensor) -> Tensor:
        """The final features as a map (B, D, ceil(H / stride), ceil(W / stride)) of the last stage."""

    def parts_after(self, index: int, tap: str = "output") -> list[Any]:
        """Modules and parameters after a tap (of :data:`TAPS`) at an index of ``forward_intermediates``: not needed."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions for parameter names: ``stem``, and ``blocks`` with the block's number as a group."""

    def no_weight_decay(self) -> Iterable[str]:
        """Names, or last parts of names, of parameters that are not decayed; 1-D parameters never are."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their activations."""


@runtime_checkable
class TapByTap(Protocol):
    """A model that returns its own taps to :func:`tinymim.distill.read`, which reads all others through hooks."""

    maskable: bool  # whether patches can be dropped

    def run_taps(
        self, images: Tensor, wanted: Mapping[int, Iterable[str]], keep_BV: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """See :func:`tinymim.distill.read`; returns block (from 1) -> name of :data:`TAPS` -> (B, T, D)."""


class Shell(nn.Module):
    """A wrapper that exposes the parameters and modules of another module under their own names, without a prefix.

    The two share them: names, order, state dict, ``.to()``. Other attributes are looked up on ``inner``.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        shared = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
        vars(self).update({name: vars(inner)[name] for name in shared}, inner=inner)

    def train(self, mode: bool = True) -> "Shell":
        """Set the mode of both."""
        vars(self)["inner"].train(mode)
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in vars(self):  # being copied
                raise
            return getattr(vars(self)["inner"], name)


# layers and weight decay ------------------------------------------------------------------------------------------


class Layers:
    """Layer of a parameter by its name, from a model's stem and block patterns (timm's ``group_matcher``).

    0 = stem, 1 .. n = blocks in order, ``above`` = n + 1 = everything that no pattern matches.
    """

    def __init__(self, model: Any) -> None:
        matcher = model.group_matcher()
        stem, blocks = matcher["stem"], matcher["blocks"]
        blocks = [(blocks, None)] if isinstance(blocks, str) else blocks
        self.patterns = [(re.compile(stem), 0, ())] + [(re.compile(text), 1, suffix or ()) for text, suffix in blocks]
        found = sorted({key for name, _ in model.named_parameters() if (key := self._key(name)) and key[0] == 1})
        own = [key for key in found if key[-1] != 99999]  # timm: belongs to the block before
        self.numbers = {(0,): 0} | {key: number for number, key in enumerate(own, 1)}
        self.above = len(own) + 1
        self.numbers |= {key: self.above - 1 for key in found if key not in self.numbers}

    def _key(self, name: str) -> tuple[int, ...] | None:
        for pattern, first, suffix in self.patterns:
            if found := pattern.match(name):
                return (first, *(int(group) for group in found.groups() if group is not None), *suffix)
        return None

    def of(self, name: str) -> int:
        """Layer of a parameter.

        Raises:
            ConfigError: its name refers to a block that the model does not have.
        """
        key = self._key(name)
        if key is not None and key not in self.numbers:
            raise ConfigError(
                f"parameter {name!r} belongs to no layer of this backbone",
                f"it has {self.above - 1} blocks",
                "give the name as named_parameters() returns it",
            )
        return self.above if key is None else self.numbers[key]


@dataclass
class DecayGroup:
    """Parameters of one layer with, or without, weight decay."""

    layer: int
    decayed: bool
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], layer_of: Callable[[str], int], undecayed: Iterable[str]
) -> list[DecayGroup]:
    """Trainable parameters by layer and weight decay: none on parameters of one dimension and on ``undecayed`` names.

    Args:
        parameters: (name, parameter) pairs, as ``named_parameters`` returns them.
        layer_of: Name -> layer.
        undecayed: Names, or their last parts (:meth:`Backbone.no_weight_decay`).

    Returns:
        Groups in order of first occurrence. The learning rate of layer i is ``layer_decay ** (depth + 1 - i)`` times
        the base rate (BEiT, arXiv 2106.08254; MAE).
    """
    free = tuple(f".{name}" for name in undecayed)
    groups: dict[tuple[int, bool], DecayGroup] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name), parameter.ndim > 1 and not f".{name}".endswith(free)
        group = groups.setdefault((layer, decayed), DecayGroup(layer, decayed))
        group.names.append(name)
        group.params.append(parameter)
    return list(groups.values())


# the registry of backbones ----------------------------------------------------------------------------------------

_BUILDERS: dict[str, Callable[..., Any]] = {}
PLAIN = "vit"  # the backbone of a config without a name


def qualified_name(builder: Any) -> str:
    """Module and name of a class or function, for errors of registries."""
    return f"{builder.__module__}.{builder.__qualname__}"


def register_backbone(*names: str) -> Callable[[Any], Any]:
    """Decorator: a class or function that builds the backbones of these names.

    It is called with keywords: ``img_size``, ``drop_path_rate``, the entries of its ``config``, and ``name`` if it
    accepts one.

    Raises:
        ConfigError: another builder has one of the names.
    """

    def add(builder: Any) -> Any:
        for name in names:
            known = _BUILDERS.get(name)
            if known is not None and qualified_name(known) != qualified_name(builder):
                raise ConfigError(
                    f"two backbones are called {name!r}",
                    f"{qualified_name(known)} already has this name",
                    "register yours under another name",
                )
        _BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return add


def backbone_names() -> list[str]:
    """All names that :func:`build_backbone` (and ``tinymim.create_model``) accepts."""
    return list(_BUILDERS)


def backbone_arguments(name: str) -> dict[str, inspect.Parameter] | None:
    """Keywords that the backbone of this name can be built with; None: its builder takes any.

    A builder with ``**arguments`` can tell: its ``more_arguments(name)`` is the class or function that takes them.
    """
    builder = _BUILDERS[name]
    known = {key: each for key, each in inspect.signature(builder).parameters.items() if key != "name"}
    if hasattr(builder, "more_arguments"):
        more = inspect.signature(builder.more_arguments(name)).parameters
        known = {**more, **{key: each for key, each in known.items() if each.kind is not each.VAR_KEYWORD}}
    return None if any(each.kind is each.VAR_KEYWORD for each in known.values()) else known


def build_backbone(name: str, **arguments: Any) -> Any:
    """A :class:`Backbone` by name.

    Raises:
        ConfigError: unknown name or argument, or arguments that do not fit together.
    """
    if name not in _BUILDERS:
        raise ConfigError(
            f"no backbone {name!r}",
            f"the registered backbones are {', '.join(_BUILDERS)}",
            "choose one of these, or register another one: tinymim.models.backbone.register_backbone",
        )
    builder, known = _BUILDERS[name], backbone_arguments(name)
    if known is not None and (wrong := set(arguments) - set(known)):
        raise ConfigError(
            f"cannot build {name}", f"it has no argument {min(wrong)!r}", f"its arguments are {', '.join(known)}"
        )
    if "name" in inspect.signature(builder).parameters:
        arguments["name"] = name
    return builder(**arguments)


def from_config(config: Mapping[str, Any], **changes: Any) -> Any:
    """Build the backbone that a ``config`` (of a model, or as stored in our files) describes, with random weights.

    Raises:
        ConfigError: see :func:`build_backbone`.
    """
    arguments = {**config, **changes}
    return build_backbone(arguments.pop("name", PLAIN), **arguments)


def pick_taps(model: Backbone, indices: int | Sequence[int] | None) -> list[int]:
    """Indices of ``forward_intermediates`` as numbers from 0: negative ones count from the end, an int n takes the
    last n.

    Raises:
        ConfigError: an index that the model does not have.
    """
    count = model.stage_info[-1].taps.stop
    if indices is None:
        indices = range(count)
    elif isinstance(indices, int):
        indices = range(count - indices, count)
    if not all(-count <= i < count for i in indices):
        what = "blocks" if count == model.depth else "stages"
        raise ConfigError(
            f"indices={list(indices)} is out of range",
            f"the model has {count} {what}, numbered from 0",
            f"use numbers from 0 to {count - 1}",
        )
    return [i % count for i in indices]
