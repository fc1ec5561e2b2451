"""What of a model can be made smaller, factor by factor (TinyViT, arXiv 2207.10666, contraction factors).

A model is described by its ``config`` (see :class:`tinymim.models.backbone.Backbone`) with every factor written out:
:func:`written_out`. The paper names the factors but not their steps; the steps here are ours.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tinymim.errors import ConfigError
from tinymim.models.backbone import PLAIN
from tinymim.models.registry import SIZES

Config = dict[str, Any]
RATIO, LEAST_RATIO = 0.5, 1.0  # step and smallest value of the expansion of MBConv and MLP
HEAD, LEAST_HEAD = 8, 8  # channels of a head: step and smallest value
STEM, LEAST_STEM = 16, 16  # width of TinyViT's first stage, which has no heads
LEAST_WINDOW = 4  # tokens a side


class Factor(NamedTuple):
    """One number of a model.

    Attributes:
        name: The paper's letter, and the stage: ``D3``.
        about: In words.
        value: Config -> its value, for people.
        shrink: Config -> the config with this number one step smaller, or None at its smallest.
    """

    name: str
    about: str
    value: Callable[[Config], Any]
    shrink: Callable[[Config], Config | None]


def kind_of(config: Mapping[str, Any]) -> str:
    """ "vit" or "tiny_vit".

    Raises:
        ConfigError: a model of another kind.
    """
    name = str(config.get("name", PLAIN))
    if name == PLAIN or name in SIZES:
        return "vit"
    if name.startswith("tiny_vit_"):
        return "tiny_vit"
    raise ConfigError(
        f"{name} cannot be contracted",
        "the factors of plain vision transformers and of TinyViT are known, those of other families are not",
        "start from tinymim_vit_small, tiny_vit_21m_224, or a student file of these",
    )


def written_out(model: Any) -> Config:
    """The config of a model as JSON values, with every factor in it.

    Raises:
        ConfigError: a model that cannot be contracted.
    """
    config = dict(model.config)
    if kind_of(config) == "tiny_vit":
        attention = [[block.attn for block in stage.blocks] for stage in model.stages[1:]]
        first = model.stages[0].blocks[0].conv1.conv
        config |= {
            "embed_dims": [stage.width for stage in model.stage_info],
            "depths": [len(stage.blocks) for stage in model.stage_info],
            "num_heads": [1, *(blocks[0].num_heads for blocks in attention)],  # the first stage has none
            "window_sizes": [7, *(blocks[0].resolution[0] for blocks in attention)],  # nor windows
            "mlp_ratio": float(model.mlp_ratio),
            "mbconv_expand_ratio": first.out_channels / first.in_channels,
        }
    return dict(json.loads(json.dumps(config)))


def factors(config: Config) -> list[Factor]:
    """The factors of a config, in a fixed order.

    Raises:
        ConfigError: a model that cannot be contracted.
    """
    return VIT if kind_of(config) == "vit" else TINY_VIT


def smallest(config: Config) -> Config:
    """The config with every factor at its smallest."""
    for factor in factors(config):
        while (smaller := factor.shrink(config)) is not None:
            config = smaller
    return config


# plain vision transformers ------------------------------------------------------------------------------------------


def _less(key: str, step: float, least: float) -> Callable[[Config], Config | None]:
    """Shrinks one number."""

    def shrink(config: Config) -> Config | None:
        value = config[key] - step
        return {**config, key: value} if value >= least else None

    return shrink


def _fewer_heads(config: Config) -> Config | None:
    wide = config["embed_dim"] // config["num_heads"]
    for heads in range(config["num_heads"] - 1, 0, -1):
        if wide * heads % 4 == 0:  # as ViT's positions need
            return {**config, "num_heads": heads, "embed_dim": wide * heads}
    return None


def _narrower_heads(config: Config) -> Config | None:
    wide = config["embed_dim"] // config["num_heads"] - HEAD
    wide -= wide % 4
    return {**config, "embed_dim": wide * config["num_heads"]} if wide >= LEAST_HEAD else None


VIT = [
    Factor("D", "heads, and with them the width", lambda c: c["embed_dim"], _fewer_heads),
    Factor("E", "width of a head", lambda c: c["embed_dim"] // c["num_heads"], _narrower_heads),
    Factor("N", "blocks", lambda c: c["depth"], _less("depth", 1, 1)),
    Factor("M", "MLP ratio", lambda c: c["mlp_ratio"], _less("mlp_ratio", RATIO, LEAST_RATIO)),
]

# TinyViT ------------------------------------------------------------------------------------------------------------


def _entry(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


def _narrower_stage(stage: int) -> Callable[[Config], Config | None]:
    """One head fewer; the first stage, which has none, by :data:`STEM` channels."""

    def shrink(config: Config) -> Config | None:
        width, heads = config["embed_dims"][stage], config["num_heads"][stage]
        if stage == 0:
            width -= STEM
            return {**config, "embed_dims": _entry(config["embed_dims"], 0, width)} if width >= LEAST_STEM else None
        if heads == 1:
            return None
        dims = _entry(config["embed_dims"], stage, width // heads * (heads - 1))
        return {**config, "embed_dims": dims, "num_heads": _entry(config["num_heads"], stage, heads - 1)}

    return shrink


def _fewer_blocks(stage: int) -> Callable[[Config], Config | None]:
    def shrink(config: Config) -> Config | None:
        depth = config["depths"][stage] - 1
        return {**config, "depths": _entry(config["depths"], stage, depth)} if depth else None

    return shrink


def _smaller_window(stage: int) -> Callable[[Config], Config | None]:
    """The next smaller window that needs no padding at the model's image size."""

    def shrink(config: Config) -> Config | None:
        now = config["window_sizes"][stage]
        grid = [-(-side // (4 << stage)) for side in config["img_size"]]
        fits = [w for w in range(LEAST_WINDOW, now) if all(side % w == 0 for side in grid)]
        return {**config, "window_sizes": _entry(config["window_sizes"], stage, fits[-1])} if fits else None

    return shrink


def _narrower_heads_of_stages(config: Config) -> Config | None:
    heads = config["num_heads"][1:]
    wide = [width // count - HEAD for width, count in zip(config["embed_dims"][1:], heads, strict=True)]
    if min(wide) < LEAST_HEAD:
        return None
    return {**config, "embed_dims": [config["embed_dims"][0], *(w * h for w, h in zip(wide, heads, strict=True))]}


def _at(key: str, stage: int) -> Callable[[Config], Any]:
    return lambda config: config[key][stage]


TINY_VIT = [
    *(Factor(f"D{i + 1}", f"width of stage {i + 1}", _at("embed_dims", i), _narrower_stage(i)) for i in range(4)),
    *(Factor(f"N{i + 1}", f"blocks of stage {i + 1}", _at("depths", i), _fewer_blocks(i)) for i in range(4)),
    *(Factor(f"W{i + 1}", f"window of stage {i + 1}", _at("window_sizes", i), _smaller_window(i)) for i in (1, 2, 3)),
    Factor(
        "R",
        "expansion of MBConv",
        lambda c: c["mbconv_expand_ratio"],
        _less("mbconv_expand_ratio", RATIO, LEAST_RATIO),
    ),
    Factor("M", "MLP ratio", lambda c: c["mlp_ratio"], _less("mlp_ratio", RATIO, LEAST_RATIO)),
    Factor(
        "E",
        "width of a head of stages 2 to 4",
        lambda c: c["embed_dims"][1] // c["num_heads"][1],
        _narrower_heads_of_stages,
    ),
]
