"""A whole segmentor as what is contracted: the backbone's factors, and the width of the head.

A config of the search is the backbone's with every factor written out, and ``head_channels``: the ``channels`` of the
decode head (None where it is the width of what the head reads, as of a linear head). The other widths follow:
``in_channels`` of the heads, the pyramid, and the blocks that are read, in proportion to the depth.

Which dimensions of the tensors outside the backbone lie on which axis is found by building the model with another
width and comparing shapes. Where a dimension holds several, the backbone's come first, as in UperNet, which
concatenates a level and what it has pooled of it. All dimensions of the head's width keep the same channels: what is
added up or concatenated stays together.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config as SegConfig
from torch import Tensor, nn

from tinymim.contract import factors as backbones
from tinymim.contract.factors import Config, Factor, kind_of, written_out
from tinymim.contract.inherit import Joined, fill, layout
from tinymim.errors import ConfigError
from tinymim.models.backbone import from_config
from tinymim.models.checkpoints import save_torch
from tinymim.schema import parse
from tinymim.seg import TinyMIMBackbone, load_segmentor
from tinymim.seg.config import build_model as build
from tinymim.seg.config import building, config_text, heads, plain_batch_norm

HEAD, LEAST_HEAD = 16, 16  # channels of the decode head: step and smallest value
WIDTH = "head_channels"
Count = Callable[[nn.Module, SegConfig], tuple[int, int]]


class Segmentors:
    """Segmentors of one config, made smaller.

    Args:
        start: The segmentor with its weights, as :func:`tinymim.seg.load_segmentor` or
            :func:`tinymim.seg.config.build_model` gives it.
        cfg: Its config.

    Raises:
        ConfigError: another backbone than ours, or a model that cannot be contracted.
    """

    file, about = "segmentor.pth", "the whole segmentor, as exported"

    def __init__(self, start: Any, cfg: SegConfig) -> None:
        check(cfg)
        self.start, self.cfg = start.eval(), cfg
        own = cfg.model.backbone
        self.depth, self.taps = start.backbone.depth, start.backbone.out_indices
        head = cfg.model.decode_head
        self.config = {**written_out(start.backbone.inner), WIDTH: None if _tied(head) else head.channels}
        self.plain = kind_of(self.config) == "vit"
        self.least_depth = len(self.taps) if self.plain else 1
        own.init_cfg = cfg.model.init_cfg = None
        plain_batch_norm(cfg)
        self._axes = self._probe()
        self._cache: dict[str, tuple[int, int]] = {}
        self._count: Count | None = None

    # the factors -----------------------------------------------------------------------------------------------------

    def factors(self, config: Config) -> list[Factor]:
        """The backbone's factors, and H."""
        found = [
            factor._replace(shrink=functools.partial(self._deep_enough, factor.shrink))
            if factor.name == "N"
            else factor
            for factor in backbones.factors(config)
        ]
        return found if config[WIDTH] is None else [*found, HEAD_WIDTH]

    def _deep_enough(self, shrink: Callable[[Config], Config | None], config: Config) -> Config | None:
        """Every level needs a block of its own."""
        found = shrink(config)
        return None if found is None or found["depth"] < self.least_depth else found

    def smallest(self, config: Config) -> Config:
        """The config with every factor at its smallest."""
        for factor in self.factors(config):
            while (smaller := factor.shrink(config)) is not None:
                config = smaller
        return config

    # models ----------------------------------------------------------------------------------------------------------

    def config_of(self, config: Config) -> SegConfig:
        """The whole config of a segmentor."""
        cfg = SegConfig(self.cfg.to_dict())
        own = cfg.model.backbone
        for key, value in config.items():
            if key != WIDTH and value != self.config[key]:
                own[key] = value
        if self.plain:
            own.out_indices = self._read(config["depth"])
        given = {key: value for key, value in own.items() if key != "type"}
        with torch.device("meta"), building("backbone"):
            widths = TinyMIMBackbone(**given).out_channels
        for head in heads(cfg):
            before, at = head.in_channels, head.get("in_index", -1)
            head.in_channels = [widths[i] for i in at] if isinstance(at, list | tuple) else widths[at]
            if _tied(head) and head.channels == before:
                head.channels = head.in_channels
        if config[WIDTH] is not None:
            cfg.model.decode_head.channels = config[WIDTH]
        return cfg

    def _read(self, depth: int) -> tuple[int, ...]:
        """The blocks that feed the levels: at the same share of the depth, each level another."""
        blocks: list[int] = []
        for level, tap in enumerate(self.taps):
            least = blocks[-1] + 1 if blocks else 0
            most = depth - len(self.taps) + level  # the levels after it need a block each
            blocks.append(min(max(round((tap + 1) * depth / self.depth) - 1, least), most))
        return tuple(blocks)

    def outline(self, config: Config) -> Any:
        """A segmentor without values."""
        return _outline(self.config_of(config))

    def count_with(self, count: Count) -> None:
        """Set how segmentors are counted (this room does not know how they are exported).

        Args:
            count: A segmentor on PyTorch's meta device, and its config -> parameters and multiply-adds.
        """
        self._count = count
        self._cache.clear()

    def count(self, config: Config) -> tuple[int, int]:
        """Parameters and multiply-adds of the exported file."""
        assert self._count is not None
        key = json.dumps(config)
        if key not in self._cache:
            cfg = self.config_of(config)
            self._cache[key] = self._count(_outline(cfg), cfg)
        return self._cache[key]

    def inherit(self, config: Config, parent: Any, parent_config: Config) -> Any:
        """A smaller segmentor with the weights of a larger one; see :mod:`tinymim.contract.inherit`."""
        cfg = self.config_of(config)
        with torch.random.fork_rng(devices=[]):
            child = build(cfg)
        fill(child, parent, self._layout(config), self._layout(parent_config), kind_of(config))
        child.cfg, child.dataset_meta = cfg, self.start.dataset_meta
        return child.eval()

    def open(self, file: Path) -> Any:
        """The segmentor of a file."""
        return load_segmentor(file)[0]

    def save(self, model: Any, file: Path, meta: dict[str, Any] | None = None) -> None:
        """Write a segmentor as training does."""
        pre = model.cfg.model.data_preprocessor
        about = {
            "config": config_text(model.cfg),
            "backbone": dict(model.backbone.config),
            **model.dataset_meta,
            "mean": pre.get("mean"),
            "std": pre.get("std"),
            **(meta or {}),
        }
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_torch({"state_dict": state, "meta": about}, file)

    # axes ------------------------------------------------------------------------------------------------------------

    def _probe(self) -> dict[str, list[tuple[tuple[str | None, int], ...]]]:
        """Name of a tensor outside the backbone -> for each dimension how often it holds each axis, and the rest."""
        first, others = self._outside(self.outline(self.config)), self._wider(self.config)
        wider = {axis: self._outside(self.outline(config)) for axis, config in others.items()}
        sizes = self._sizes(self.config)
        grown = {axis: self._sizes(config)[axis] - sizes[axis] for axis, config in others.items()}
        found: dict[str, list[tuple[tuple[str | None, int], ...]]] = {}
        for name, value in first.items():
            found[name] = []
            for dimension, size in enumerate(value.shape):
                held = {axis: (wider[axis][name].shape[dimension] - size) / grown[axis] for axis in wider}
                rest = size - sum(int(times) * sizes[axis] for axis, times in held.items())
                if rest < 0 or any(times != int(times) or times < 0 for times in held.values()):
                    raise ConfigError(
                        f"{name} cannot be contracted",
                        f"its {size} entries do not follow from the widths of backbone and head",
                        "choose another head, e.g. UPerHead, FPNHead, SegformerHead or FCNHead",
                    )
                times = tuple((axis, int(count)) for axis, count in held.items() if count)
                found[name].append((*times, *(((None, rest),) if rest else ())))
        return found

    def _wider(self, config: Config) -> dict[str, Config]:
        """Axis -> the config with it alone a little wider."""
        if self.plain:
            found = {"width": {**config, "embed_dim": config["embed_dim"] + 4 * config["num_heads"]}}
        else:
            found = {}
            for i, (width, count) in enumerate(zip(config["embed_dims"], config["num_heads"], strict=True)):
                dims = [*config["embed_dims"]]
                dims[i] = width + 16 * count
                found[f"width {i}"] = {**config, "embed_dims": dims}
        return found if config[WIDTH] is None else found | {WIDTH: {**config, WIDTH: config[WIDTH] + HEAD}}

    def _sizes(self, config: Config) -> dict[str, int]:
        """Axis -> its size."""
        if self.plain:
            sizes = {"width": config["embed_dim"]}
        else:
            sizes = {f"width {i}": width for i, width in enumerate(config["embed_dims"])}
        return sizes if config[WIDTH] is None else sizes | {WIDTH: config[WIDTH]}

    def _outside(self, model: Any) -> dict[str, Tensor]:
        """The tensors of a segmentor that its backbone alone does not have, under the names of :func:`fill`."""
        own = {f"backbone.{name}" for name in _bare(self.config)}
        return {name.removeprefix("backbone."): value for name, value in model.state_dict().items() if name not in own}

    def _layout(self, config: Config) -> Callable[[str, Tensor], tuple[Tensor, tuple[Any, ...]]]:
        backbone, sizes = layout({"last_dim": None, **config}), self._sizes(config)

        def found(name: str, value: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            if name not in self._axes:
                return backbone(name, value)
            axes: list[Joined | None] = []
            for held in self._axes[name]:
                parts = [
                    (axis, sizes[axis] if axis else times) for axis, times in held for _ in range(times if axis else 1)
                ]
                axes.append(tuple(parts) if any(axis for axis, _ in parts) else None)
            return value, tuple(axes)

        return found


def _fewer_channels(config: Config) -> Config | None:
    channels = config[WIDTH] - HEAD
    return {**config, WIDTH: channels} if channels >= LEAST_HEAD else None


HEAD_WIDTH = Factor("H", "width of the decode head", lambda config: config[WIDTH], _fewer_channels)


def check(cfg: SegConfig) -> None:
    """Refuse segmentors that cannot be contracted.

    Raises:
        ConfigError: another backbone than ours, a neck, or a head without a width.
    """
    model = cfg.model
    if model.backbone.get("type") != "TinyMIMBackbone":
        raise ConfigError(
            f"a segmentor on {model.backbone.get('type')} cannot be contracted",
            "the factors of plain vision transformers and of TinyViT are known, those of other backbones are not",
            "choose a config on TinyMIMBackbone, e.g. upernet_tinymim_t_light or upernet_tinyvit_5m_light",
        )
    kind_of(model.backbone)
    head = model.decode_head
    if model.get("neck") or not isinstance(head, dict) or not isinstance(head.get("channels"), int):
        raise ConfigError(
            "a segmentor with a neck, several heads or a head without one width cannot be contracted",
            f"its head is {head.get('type') if isinstance(head, dict) else head!r:.80}",
            "choose a config with one decode head on the backbone's levels",
        )


def _tied(head: Any) -> bool:
    """Whether a head's width is that of what it reads."""
    return bool(head.type == "FCNHead" and head.get("num_convs", 2) == 0)


def _outline(cfg: SegConfig) -> Any:
    """The segmentor of a config, without values."""
    with torch.device("meta"):
        return build(cfg).eval()


@functools.cache
def _names(config: str) -> tuple[str, ...]:
    with torch.device("meta"):
        return tuple(from_config(parse(config, dict[str, Any], "the backbone")).state_dict())


def _bare(config: Config) -> Sequence[str]:
    return _names(json.dumps({key: value for key, value in config.items() if key != WIDTH}))
