"""A smaller model's first weights, taken from a larger one (no training, no photos).

Every dimension of every tensor lies on an *axis*: the channels of a stage, the heads of a block, the hidden units of an
MLP. For each axis the entries with the largest norm are kept, in their order: the root of the sum of squares of the
larger model's weight matrices over what belongs to an entry. Blocks with the largest norm of what they add to the
residual stream are kept, in their order. Windows keep the biases of the distances that still occur. A model that is not
smaller inherits every tensor as it is. The rule is ours (the paper does not tell one).

Legend: axes are named after what they count and where, e.g. ``width 2``, ``heads 1.0``; None: kept whole.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinymim.contract.factors import Config, kind_of
from tinymim.models.backbone import from_config
from tinymim.models.classifier import Classifier

State = Mapping[str, Tensor]
Joined = tuple[tuple[str | None, int], ...]  # axes one after the other in one dimension, and the size of each
Layout = Callable[[str, Tensor], tuple[Tensor, tuple[Any, ...]]]  # see :func:`fill`
FIRST = "first "  # of these axes the first entries are kept


class Dimensions(NamedTuple):
    """How the tensors of some names are cut.

    Attributes:
        names: Regular expression of the names; its groups fill ``{0}``, ``{1}`` of the axes.
        axes: Axis of each dimension.
        shape: (config, groups) -> the tensor's shape when its dimensions are told apart, e.g. (3, heads, channels,
            width) of ``qkv``; None: as stored.
    """

    names: str
    axes: tuple[str | None, ...]
    shape: Callable[[Config, Sequence[str]], tuple[int, ...]] | None = None


def _vit_heads(parts: int, last: bool) -> Callable[[Config, Sequence[str]], tuple[int, ...]]:
    """Shape of qkv (parts, heads, channels), with the width after it for the weight; of proj's weight."""

    def shape(config: Config, groups: Sequence[str]) -> tuple[int, ...]:
        width, heads = config["embed_dim"], config["num_heads"]
        inner = (heads, width // heads)
        return (width, *inner) if parts == 1 else (parts, *inner, width) if last else (parts, *inner)

    return shape


VIT = (
    Dimensions(r"(?:cls_token|dist_token|pos_embed)", (None, None, "width")),
    Dimensions(r"patch_embed\.proj\.weight", ("width", None, None, None)),
    Dimensions(r"(?:patch_embed\.proj\.bias|norm\.\w+|conv1x1\.0\.\w+)", ("width",)),
    Dimensions(r"conv1x1\.1\.weight", (None, "width")),
    Dimensions(r"conv1x1\.1\.bias", (None,)),
    Dimensions(r"blocks\.(\d+)\.(?:norm\d\.\w+|ls\d\.gamma|attn\.proj\.bias|mlp\.fc2\.bias)", ("width",)),
    Dimensions(r"blocks\.(\d+)\.attn\.relative_position_bias_table", (None, "heads {0}")),
    Dimensions(
        r"blocks\.(\d+)\.attn\.qkv\.weight", (None, "heads {0}", "channels {0}", "width"), _vit_heads(3, last=True)
    ),
    Dimensions(r"blocks\.(\d+)\.attn\.qkv\.bias", (None, "heads {0}", "channels {0}"), _vit_heads(3, last=False)),
    Dimensions(r"blocks\.(\d+)\.attn\.proj\.weight", ("width", "heads {0}", "channels {0}"), _vit_heads(1, last=False)),
    Dimensions(r"blocks\.(\d+)\.mlp\.fc1\.weight", ("hidden {0}", "width")),
    Dimensions(r"blocks\.(\d+)\.mlp\.fc1\.bias", ("hidden {0}",)),
    Dimensions(r"blocks\.(\d+)\.mlp\.fc2\.weight", ("width", "hidden {0}")),
)
HEADS = (  # of a classifier on a plain model
    Dimensions(r"fc_norm\.\w+", ("width",)),
    Dimensions(r"head(?:_dist)?\.weight", (None, "width")),
    Dimensions(r"head(?:_dist)?\.bias", (None,)),
)
WIDE_HEADS = (Dimensions(r"(?:fc_norm|head|head_dist)\.\w+", ()),)  # on last_dim, which stays


def _stage_heads(parts: int, last: bool) -> Callable[[Config, Sequence[str]], tuple[int, ...]]:
    """As :func:`_vit_heads`, but TinyViT's qkv is (heads, parts, channels)."""

    def shape(config: Config, groups: Sequence[str]) -> tuple[int, ...]:
        width, heads = config["embed_dims"][int(groups[0])], config["num_heads"][int(groups[0])]
        wide = width // heads
        return (width, heads, wide) if parts == 1 else (heads, parts, wide, width) if last else (heads, parts, wide)

    return shape


def _window(config: Config, groups: Sequence[str]) -> tuple[int, ...]:
    """Shape of a bias table: |rows| and |columns| between two tokens."""
    side = config["window_sizes"][int(groups[0])]
    return (config["num_heads"][int(groups[0])], side, side)


BLOCK = r"stages\.([1-3])\.blocks\.(\d+)\."
STATISTICS = r"bn\.(?:weight|bias|running_mean|running_var)"
TINY_VIT = (
    Dimensions(r"patch_embed\.conv1\.conv\.weight", ("stem", None, None, None)),
    Dimensions(rf"patch_embed\.conv1\.{STATISTICS}", ("stem",)),
    Dimensions(r"patch_embed\.conv2\.conv\.weight", ("width 0", "stem", None, None)),
    Dimensions(rf"patch_embed\.conv2\.{STATISTICS}", ("width 0",)),
    Dimensions(r"stages\.0\.blocks\.(\d+)\.conv1\.conv\.weight", ("hidden 0.{0}", "width 0", None, None)),
    Dimensions(r"stages\.0\.blocks\.(\d+)\.conv2\.conv\.weight", ("hidden 0.{0}", None, None, None)),
    Dimensions(r"stages\.0\.blocks\.(\d+)\.conv3\.conv\.weight", ("width 0", "hidden 0.{0}", None, None)),
    Dimensions(rf"stages\.0\.blocks\.(\d+)\.conv[12]\.{STATISTICS}", ("hidden 0.{0}",)),
    Dimensions(rf"stages\.0\.blocks\.(\d+)\.conv3\.{STATISTICS}", ("width 0",)),
    *(
        Dimensions(rf"stages\.({i})\.downsample\.conv1\.conv\.weight", (f"merge {i}", f"width {i - 1}", None, None))
        for i in (1, 2, 3)
    ),
    Dimensions(r"stages\.([1-3])\.downsample\.conv2\.conv\.weight", ("merge {0}", None, None, None)),
    Dimensions(rf"stages\.([1-3])\.downsample\.conv[12]\.{STATISTICS}", ("merge {0}",)),
    Dimensions(r"stages\.([1-3])\.downsample\.conv3\.conv\.weight", ("width {0}", "merge {0}", None, None)),
    Dimensions(rf"stages\.([1-3])\.downsample\.conv3\.{STATISTICS}", ("width {0}",)),
    Dimensions(rf"{BLOCK}(?:attn\.norm|mlp\.norm)\.\w+", ("width {0}",)),
    Dimensions(rf"{BLOCK}(?:attn\.proj|mlp\.fc2)\.bias", ("width {0}",)),
    Dimensions(rf"{BLOCK}local_conv\.conv\.weight", ("width {0}", None, None, None)),
    Dimensions(rf"{BLOCK}local_conv\.{STATISTICS}", ("width {0}",)),
    Dimensions(
        rf"{BLOCK}attn\.qkv\.weight",
        ("heads {0}.{1}", None, "channels {0}.{1}", "width {0}"),
        _stage_heads(3, last=True),
    ),
    Dimensions(rf"{BLOCK}attn\.qkv\.bias", ("heads {0}.{1}", None, "channels {0}.{1}"), _stage_heads(3, last=False)),
    Dimensions(
        rf"{BLOCK}attn\.proj\.weight", ("width {0}", "heads {0}.{1}", "channels {0}.{1}"), _stage_heads(1, last=False)
    ),
    Dimensions(
        rf"{BLOCK}attn\.attention_biases", ("heads {0}.{1}", f"{FIRST}rows {{0}}", f"{FIRST}columns {{0}}"), _window
    ),
    Dimensions(rf"{BLOCK}mlp\.fc1\.weight", ("hidden {0}.{1}", "width {0}")),
    Dimensions(rf"{BLOCK}mlp\.fc1\.bias", ("hidden {0}.{1}",)),
    Dimensions(rf"{BLOCK}mlp\.fc2\.weight", ("width {0}", "hidden {0}.{1}")),
    Dimensions(r".+\.num_batches_tracked", ()),
    Dimensions(r"head\.norm\.\w+", ("width 3",)),
    Dimensions(r"head\.fc\.weight", (None, "width 3")),
    Dimensions(r"head\.fc\.bias", (None,)),
)
# blocks: (pattern of a name before its block's number, the number, the rest), what a block adds to the stream
PLACES = {"vit": r"(blocks\.)(\d+)(\..+)", "tiny_vit": r"(stages\.\d+\.blocks\.)(\d+)(\..+)"}
ADDS = r"(attn\.proj|mlp\.fc2|conv3\.conv)\.weight$"


def inherit(config: Config, parent: Any, parent_config: Config) -> Any:
    """A smaller model with the weights of a larger one where shapes allow: they always do, for each is cut.

    Args:
        config: Of the smaller model, from :mod:`tinymim.contract.factors`.
        parent: The larger model, or a classifier on it: then the smaller one is a classifier of the same classes, too.
        parent_config: Its config, with every factor written out.

    Returns:
        The smaller model, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        child: Any = from_config(config)
        if isinstance(parent, Classifier):
            child = Classifier(child, parent.num_classes)
    fill(child, parent, layout(config), layout(parent_config), kind_of(config))
    return child.eval()


def layout(config: Config) -> Layout:
    """How the tensors of a backbone or classifier are told apart."""
    own = TINY_VIT if kind_of(config) == "tiny_vit" else (*VIT, *(WIDE_HEADS if config["last_dim"] else HEADS))
    return lambda name, value: apart(name, value, config, own)


def fill(child: Any, parent: Any, own: Layout, theirs: Layout, kind: str) -> None:
    """Give a smaller model the entries of a larger one that have the largest norm.

    Args:
        child: The smaller model, changed in place.
        parent: The larger one.
        own: Name of a tensor of the smaller model (without ``backbone.``), and the tensor -> it, its dimensions told
            apart, and the axis of each: a name, None, or :data:`Joined`.
        theirs: The same for the larger model.
        kind: "vit" or "tiny_vit".
    """
    target = {name.removeprefix("backbone."): value for name, value in child.state_dict().items()}
    state = {name.removeprefix("backbone."): value for name, value in parent.state_dict().items()}
    source = {name: theirs(name, value) for name, value in _without_blocks(state, target, PLACES[kind]).items()}
    sizes: dict[str, int] = {}
    for name, value in target.items():
        shaped, axes = own(name, value)
        for axis, size in zip(axes, shaped.shape, strict=False):
            sizes |= {each: count for each, count in _parts(axis, size) if each is not None}
    kept = {axis: _largest(axis, size, source.values()) for axis, size in sizes.items()}
    with torch.no_grad():
        for name, tensor in target.items():
            value, axes = source[name]
            for dimension, axis in enumerate(axes):
                if axis is not None:
                    value = value.index_select(dimension, _index(axis, value.shape[dimension], kept))
            tensor.copy_(value.reshape(tensor.shape))


def _parts(axis: Any, size: int) -> Joined:
    """The axes that lie one after the other in a dimension."""
    return axis if isinstance(axis, tuple) else ((axis, size),)


def _index(axis: Any, size: int, kept: Mapping[str, Tensor]) -> Tensor:
    """The entries of a dimension that are kept."""
    out, start = [], 0
    for each, count in _parts(axis, size):
        out.append(start + (torch.arange(count) if each is None else kept[each]))
        start += count
    return torch.cat(out)


def apart(name: str, value: Tensor, config: Config, table: Sequence[Dimensions]) -> tuple[Tensor, tuple[Any, ...]]:
    """A tensor with its dimensions told apart, and their axes."""
    for row in table:
        if found := re.fullmatch(row.names, name):
            groups = found.groups()
            axes = tuple(axis and axis.format(*groups) for axis in row.axes)
            return (value if row.shape is None else value.reshape(row.shape(config, groups))), axes
    raise KeyError(f"{name}: how its dimensions are cut is unknown")


def _largest(axis: str, count: int, tensors: Any) -> Tensor:
    """The ``count`` entries of an axis with the largest norm over weight matrices, in order."""
    total: Tensor | None = None
    for value, axes in tensors:
        for dimension, found in enumerate(axes):
            parts, start = _parts(found, value.shape[dimension]), 0
            for each, size in parts:
                if each == axis and axis.startswith(FIRST):
                    return torch.arange(count)
                if each == axis and value.ndim > 1:
                    own = value.detach().narrow(dimension, start, size).double()
                    norm = own.square().sum([i for i in range(value.ndim) if i != dimension])
                    total = norm if total is None else total + norm
                start += size
    assert total is not None
    return total.argsort(descending=True, stable=True)[:count].sort().values


def _without_blocks(state: State, smaller: State, place: str) -> State:
    """The tensors of a model without the blocks that a smaller one lacks; the rest numbered anew."""
    blocks: dict[str, dict[int, float]] = {}
    for name, value in state.items():
        if found := re.fullmatch(place, name):
            adds = float(value.detach().double().square().sum()) if re.search(ADDS, name) else 0.0
            norms = blocks.setdefault(found[1], {})
            norms[int(found[2])] = norms.get(int(found[2]), 0.0) + adds
    counts: dict[str, set[int]] = {}
    for name in smaller:
        if found := re.fullmatch(place, name):
            counts.setdefault(found[1], set()).add(int(found[2]))
    number: dict[tuple[str, int], int] = {}
    for stack, norms in blocks.items():
        kept = sorted(norms, key=lambda i: (-norms[i], i))[: len(counts[stack])]
        number |= {(stack, old): new for new, old in enumerate(sorted(kept))}
    out = {}
    for name, value in state.items():
        if found := re.fullmatch(place, name):
            if (found[1], int(found[2])) not in number:
                continue
            name = f"{found[1]}{number[found[1], int(found[2])]}{found[3]}"
        out[name] = value
    return out
